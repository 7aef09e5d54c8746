"""What a run leaves while it goes and when it ends: lines, samples, checkpoints, the artifact.

One decision: it decides nothing about the steps. What it is told it records, shows and makes durable, in that order.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tasks.artifacts import BASE_RECORD
from tasks.program import Events, ProgramError, Spec
from tasks.train.callbacks import COUNTED, StepLines, logged
from tasks.train.checkpoints import mark_whole, remove_damaged, rotate
from tasks.train.given import LINES
from tasks.train.measure import peak_bytes, peak_gib
from tasks.train.online.curve import draw_scores
from tasks.train.online.experience import Experience
from tasks.train.online.loop import Loop, Processes
from tasks.train.online.moved import Moved
from tasks.train.online.roles import Roles
from tasks.train.online.state import Numbers, load, required, save
from tasks.train.output import write_artifact, write_json
from tasks.train.processes import newest_common
from tasks.train.reference import ADAPTER
from tasks.training_estimate import MEASURED

SAMPLES = "samples.jsonl"
SHOWN_ANSWERS = 4  # of a step whose answers are shown


class Journal:
    """Records steps.

    Args:
        spec: of the run.
        events: told about every step.
        ranks: the processes; only the first of a machine writes.
        root: folder of the checkpoints.
        moved: what is trained.
        total: steps of the run.
        record: what the base was.
    """

    def __init__(
        self,
        spec: Spec,
        events: Events,
        ranks: Processes,
        root: Path,
        moved: dict[str, Moved],
        total: int,
        record: dict[str, Any],
    ) -> None:
        self.spec, self.events, self.ranks, self.root, self.moved = spec, events, ranks, root, moved
        self.total, self.record = total, record
        self.first = ranks.accelerator.is_local_main_process
        self.required = required(moved, ranks.here())
        self.every = spec.runtime["logging_steps"]
        self.samples = Path(spec.scratch) / SAMPLES
        self.asked, self.resumed_from = False, 0
        if threading.current_thread() is threading.main_thread():  # a test may train in another thread
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def resume(self, numbers: Numbers) -> Numbers:
        """The state of the newest whole checkpoint put back, or the one given; steps before it are told again."""
        if self.first:
            for reason in remove_damaged(self.root, self.required):
                self.events.note(reason)
        self.ranks.accelerator.wait_for_everyone()
        checkpoint = newest_common(self.root, self.required)
        if checkpoint:
            numbers = load(checkpoint, self.moved)
            self.resumed_from = numbers.step
            self.events.note(f"resumed from step {numbers.step}")
        self.lines = StepLines(Path(self.spec.scratch) / LINES if self.first else None, numbers.step)
        if self.first and self.samples.exists():
            rows = [json.loads(line) for line in self.samples.read_text(encoding="utf-8").splitlines(keepends=True)]
            _write_lines(self.samples, [row for row in rows if row["step"] <= numbers.step])
        for line in logged(self.lines.lines, self.every):
            if line["step"] % self.every == 0:
                self._metrics(line)
        return numbers

    def _metrics(self, line: dict[str, Any]) -> None:
        values = {name: value for name, value in line.items() if name not in COUNTED}
        self.events.emit("metrics", step=line["step"], values=values)

    def add(self, loop: Loop, metrics: dict[str, float], experience: Experience, rate: float) -> None:
        """Record a step that was made.

        Raises:
            ProgramError: `not_finite` for a number that is none.
        """
        step = loop.numbers.step
        bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
        if bad:
            raise ProgramError("not_finite", f"{bad} is {metrics[bad]} at step {step}. Lower learning_rate.")
        peak = float(self.ranks.sum(torch.tensor(float(peak_bytes()), device=loop.roles.policy.device)))
        if not self.first:
            return
        before = self.lines.lines[-1] if self.lines.lines else {"tokens": 0, "trained_tokens": 0}
        tokens = {"tokens": sum(map(len, experience.answers)), "trained_tokens": int(experience.mask.sum())}
        line = {"step": step, "epoch": step / loop.plan.steps_per_epoch(), "loss": metrics["policy_loss"]}
        line |= {"learning_rate": rate} | {name: before[name] + tokens[name] for name in tokens}
        line |= metrics | {"peak_memory_gib": peak_gib(peak / self.ranks.count)}
        self.lines.add(line)
        shown = ("score", "kl", "loss", "grad_norm", "learning_rate", *MEASURED)
        self.events.emit("progress", step=step, total=self.total, **{n: line[n] for n in shown if n in line})
        if step % self.every == 0 or step == self.total:
            since = (step - 1) // self.every * self.every
            self._metrics(logged([line for line in self.lines.lines if line["step"] > since], self.every)[-1])
        if step % self.spec.runtime["sample_steps"] == 0 or step == self.total:
            self._show(loop, experience, step)

    def _show(self, loop: Loop, experience: Experience, step: int) -> None:
        """Some of the step's answers with their scores."""
        texts = loop.words.texts(experience.answers[:SHOWN_ANSWERS])
        rows = [
            {"step": step, "prompt": prompt, "answer": answer, "score": round(float(score), 4), "tokens": len(i.answer)}
            for prompt, answer, score, i in zip(
                texts["prompts"], texts["completions"], experience.scores.tolist(), experience.answers, strict=False
            )
        ]
        with open(self.samples, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.events.emit("samples", step=step, rows=rows)

    def keep(self, numbers: Numbers) -> None:
        """Save the state where it is time to, or SIGTERM has come.

        Raises:
            ProgramError: `killed`; the same command goes on from the checkpoint that was saved.
        """
        asked = float(self.ranks.sum(torch.tensor(float(self.asked), device=self.ranks.accelerator.device))) > 0
        if numbers.step == self.total:
            return
        if asked or numbers.step % self.spec.runtime["save_steps"] == 0:
            folder = self.root / f"checkpoint-{numbers.step}"
            save(folder, self.moved, numbers, self.first)
            self.ranks.accelerator.wait_for_everyone()  # where the state is divided, all have written their part
            if self.first:
                self.lines.keep_in(folder)
                (folder / BASE_RECORD).write_text(json.dumps(self.record), encoding="utf-8")
                mark_whole(folder, self.required)
                rotate(self.root, self.spec.runtime["save_total_limit"], self.required)
        if asked:
            step = numbers.step
            raise ProgramError("killed", f"ended by SIGTERM; the checkpoint of step {step} of {self.total} was saved")

    def write(self, roles: Roles, loop: Loop) -> None:
        """Write the artifact: the policy alone."""
        clock, lines, settings = time.monotonic(), self.lines.lines, self.spec.settings["train"]
        if hasattr(roles.policy, "peft_config"):
            for name in [name for name in roles.policy.peft_config if name != ADAPTER]:
                roles.policy.delete_adapter(name)
            roles.policy.base_model.set_adapter(ADAPTER)
        output, report = Path(self.spec.output), Path(self.spec.output) / "report"
        base, name = Path(self.spec.inputs["base"]), self.spec.runtime.get("base_name", "")
        numbers = summary(lines, loop.plan.steps_per_epoch()) | {"shared_base": roles.shared}
        write_artifact(roles.policy, output, base, name, self.record, settings, numbers)
        report.mkdir(parents=True, exist_ok=True)
        _write_lines(report / LINES, logged(lines, self.every))
        if self.samples.exists():
            (report / SAMPLES).write_bytes(self.samples.read_bytes())
        draw_scores(lines, report / "scores.png", title=name)
        if self.resumed_from:
            write_json(report / "resume.json", {"resumed_from": self.resumed_from})
        print(f"written in {time.monotonic() - clock:.1f} s", flush=True)


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def summary(lines: Sequence[dict[str, Any]], steps_per_epoch: int) -> dict[str, Any]:
    """The numbers of `train.json` that come from the steps' own lines: `score` and `kl` are means of the last tenth."""
    last = lines[-max(1, math.ceil(len(lines) / 10)) :]
    return {
        "steps": lines[-1]["step"],
        "epochs": lines[-1]["step"] / steps_per_epoch,
        "first_score": lines[0]["score"],
        "score": math.fsum(line["score"] for line in last) / len(last),
        "kl": math.fsum(line["kl"] for line in last) / len(last),
        "stop_rate": math.fsum(line["stop_rate"] for line in last) / len(last),
        "trained_tokens": lines[-1]["trained_tokens"],
    }
