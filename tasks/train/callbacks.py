"""What happens beside the steps: events, the record of every step, the end on a number that is none, markers.

One decision: every step is recorded, whatever the logging interval. The interval is runtime, and what is written
to the artifact must not depend on it; the report shows every n-th of the recorded lines.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.artifacts import BASE_RECORD
from tasks.digests import sync
from tasks.program import Events, ProgramError
from tasks.train.checkpoints import mark_whole, rotate
from tasks.train.given import LINES
from tasks.train.measure import StepSpeed, peak_bytes, peak_gib
from tasks.train.trainer import TokenTrainer
from tasks.training_estimate import MEASURED

EVAL_LOSS, HELD_OUT = "eval_loss", "eval_"
SHOWN = ("loss", "grad_norm", "learning_rate", *MEASURED)  # of a line: what progress tells
COUNTED = ("step", "tokens", "trained_tokens")  # of a line: what is no value of its own


class StepLines:
    """One JSON line per optimizer step, in a file that survives a kill.

    `tokens` and `trained_tokens` count from the beginning of the run; `loss` is that step's own, per trained token.

    Args:
        path: the file; None on processes other than the first of a machine, which record nothing.
        step: the step of the checkpoint that is resumed from; lines behind it are dropped, as they will be made again.
        begin: the step before the first line: of a checkpoint that was given, where it knows no lines before it.

    Raises:
        ProgramError: `unexpected` when lines before that step are missing.
    """

    def __init__(self, path: Path | None, step: int, begin: int = 0) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path is None:
            return
        if step > begin:
            self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[: step - begin]]
            if [line["step"] for line in self.lines] != list(range(begin + 1, step + 1)):
                rule = f"{path.name} does not hold the steps {begin + 1} to {step} of the checkpoint"
                raise ProgramError("unexpected", rule)
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        temporary.rename(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.lines.append(line)
        if self.path is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def keep_in(self, checkpoint: Path) -> None:
        """Put the lines into a checkpoint, and make them as durable as it: it may be resumed from elsewhere."""
        if self.path is not None:
            sync(self.path)
            shutil.copyfile(self.path, checkpoint / LINES)


def logged(lines: Sequence[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    """Every n-th line and the last, with the mean loss of the steps since the line before, and their held-out loss.

    >>> logged([{"step": n, "loss": float(n)} for n in (1, 2, 3)], every=2)
    [{'step': 2, 'loss': 1.5}, {'step': 3, 'loss': 3.0}]
    """
    ends = [end for end, line in enumerate(lines, 1) if line["step"] % every == 0 or end == len(lines)]
    shown = []
    for start, end in pairwise([0, *ends]):
        part = lines[start:end]
        held_out = {name: value for line in part for name, value in line.items() if name.startswith(HELD_OUT)}
        shown.append(part[-1] | held_out | {"loss": math.fsum(line["loss"] for line in part) / len(part)})
    return shown


def best_line(lines: Sequence[dict[str, Any]], metric: str = EVAL_LOSS) -> dict[str, Any] | None:
    """The line of the step with the best held-out value, the earliest of equal ones; None without any.

    >>> lines = [{"step": 1, "eval_loss": 2.0, "eval_rewards/margins": 0.1}, {"step": 2, "eval_loss": 1.0}]
    >>> best_line(lines)["step"], best_line(lines, "eval_rewards/margins")["step"]
    (2, 1)

    Args:
        lines: of the steps.
        metric: `metric_for_best_model`; of a loss less is better, of anything else more.
    """
    measured = [line for line in lines if metric in line]
    return min(measured, key=lambda line: rank(line, metric)) if measured else None


def rank(line: Mapping[str, Any], metric: str) -> float:
    """A held-out value so that less is better."""
    return float(line[metric]) if metric.startswith(EVAL_LOSS) else -float(line[metric])


class StepWatcher(TrainerCallback):
    """Records every step, tells the task about it, and ends the run on a loss or gradient that is not finite."""

    def __init__(self, events: Events, lines: StepLines, trainer: TokenTrainer, every: int, speed: StepSpeed) -> None:
        self.events, self.lines, self.trainer, self.every, self.speed = events, lines, trainer, every, speed
        self.clock = time.perf_counter()

    def repeat(self) -> None:
        """Tell again the metrics of the steps before a resume: who follows this attempt may not have seen them."""
        for line in logged(self.lines.lines, self.every):
            if line["step"] % self.every == 0:
                self._metrics(line)

    def _metrics(self, line: dict[str, Any]) -> None:
        values = {name: value for name, value in line.items() if name not in COUNTED}
        self.events.emit("metrics", step=line["step"], values=values)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log and save as often as this run is told to; a checkpoint brings the intervals of the run that wrote it."""
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Choose the order of the epoch that begins, or that a resumed run is in."""
        self.trainer.set_epoch(state.global_step // self.trainer.sampler.plan.steps_per_epoch())
        self.clock = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Called after every step, before a checkpoint is saved: a step that is not finite is never saved."""
        state.log_history.clear()  # our lines are the record; this copy would go into every checkpoint
        if not logs or "loss" not in logs:
            return
        counts = self.trainer.counts
        require_finite_step(state.global_step, logs, counts.rows)
        peak = self.trainer.gather(torch.tensor([peak_bytes()], device=args.device)).max()
        if args.local_process_index > 0:
            return
        now = time.perf_counter()
        before = self.lines.lines[-1] if self.lines.lines else {"tokens": 0, "trained_tokens": 0}
        line = {
            "step": state.global_step,
            "epoch": logs["epoch"],
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            **{name: logs[name] for name in ("grad_norm",) if name in logs},  # DeepSpeed's stage 0 tells none
            "tokens": before["tokens"] + counts.tokens,
            "trained_tokens": before["trained_tokens"] + counts.trained,
            **self.speed.rates(counts, now - self.clock),
            "peak_memory_gib": peak_gib(float(peak)),
            **counts.metrics,
        }
        self.clock = now
        self.lines.add(line)
        shown = {name: line[name] for name in ("step", *SHOWN) if name in line}
        self.events.emit("progress", total=state.max_steps, **shown)
        step = state.global_step
        if step % self.every == 0 or step == state.max_steps:
            since = (step - 1) // self.every * self.every
            self._metrics(logged([line for line in self.lines.lines if line["step"] > since], self.every)[-1])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The time a checkpoint took is not the next step's."""
        self.clock = time.perf_counter()


class CheckpointKeeper(TrainerCallback):
    """Marks a checkpoint whole when every process has written its part, then lets older ones go.

    Args:
        root: the folder of checkpoints.
        keep: how many stay.
        lines: of the steps so far, kept in each.
        required: see `tasks.train.checkpoints.required_files`.
        record: what the base was, kept in each.
        best: keep that of the best held-out value of this name as well.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        lines: StepLines,
        required: Set[str],
        record: dict[str, Any],
        best: str | None = None,
    ) -> None:
        self.root, self.keep, self.lines, self.required, self.best = root, keep, lines, required, best
        self.record = record

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called after Trainer has written `checkpoint-N`."""
        if args.world_size > 1:
            import torch.distributed

            torch.distributed.barrier()
        if args.should_save:
            folder = self.root / f"checkpoint-{state.global_step}"
            self.lines.keep_in(folder)
            (folder / BASE_RECORD).write_text(json.dumps(self.record), encoding="utf-8")
            mark_whole(folder, self.required)
            best = best_line(self.lines.lines, self.best) if self.best else None
            rotate(self.root, self.keep, self.required, best["step"] if best else None)


class Leaving(TrainerCallback):
    """Saves and ends when SIGTERM comes: behind the step that is being made, on every process behind the same one.

    Args:
        trainer: whose processes have to agree.
    """

    def __init__(self, trainer: TokenTrainer) -> None:
        self.trainer, self.asked = trainer, False
        if threading.current_thread() is threading.main_thread():  # a test may train in another thread
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called before Trainer decides about saving."""
        asked = torch.tensor([float(self.asked)], device=args.device)
        if float(self.trainer.gather(asked).sum()) > 0:
            self.asked = True
            control.should_save = control.should_training_stop = True

    def require_end(self, step: int, total: int) -> None:
        """Leave here when the run was ended early.

        Raises:
            ProgramError: `killed`; the same command goes on from the checkpoint that was saved.
        """
        if self.asked and step < total:
            raise ProgramError("killed", f"ended by SIGTERM; the checkpoint of step {step} of {total} was saved first")


def require_finite_step(step: int, logs: dict[str, float], rows: Sequence[int] = ()) -> None:
    """End the run when a step's loss or gradient norm is not a number; the same on every process.

    Args:
        step: number of the step.
        logs: what Trainer logged of it.
        rows: sequences that this process had in it.

    Raises:
        ProgramError: `not_finite`.
    """
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if name in logs and not math.isfinite(logs[name]):
            raise ProgramError(
                "not_finite",
                f"{words} is not finite at step {step}: {logs[name]} at learning rate "
                f"{logs['learning_rate']:g}. Lower learning_rate, raise warmup_ratio or lower max_grad_norm; "
                f"if it happens at the first step, look at its sequences: {', '.join(map(str, rows))}.",
            )
