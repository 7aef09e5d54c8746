"""Held-out loss while training: measured, the best checkpoint kept, the run ended when it no longer falls.

One decision: the loss of a set is its sum over its units divided by their number, over all processes, like the loss of
a step; and what is known of it is in the lines of the steps, so a resumed run decides as one never killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.batch_plan import BatchPlan
from tasks.program import Events
from tasks.train.batches import Batch, MicroBatchSampler, make_loader
from tasks.train.callbacks import EVAL_LOSS, StepLines, StepWatcher, best_line
from tasks.train.resuming import load_weights
from tasks.train.trainer import TokenTrainer


@dataclass(frozen=True)
class HeldOutSet:
    """One held-out data set."""

    name: str
    rows: Dataset[Any]
    plan: BatchPlan


def measured_since_best(lines: Sequence[dict[str, Any]]) -> int:
    """How many measurements there were since the best one.

    >>> measured_since_best([{"step": 1, "eval_loss": 2.0}, {"step": 2}, {"step": 3, "eval_loss": 2.5}])
    1
    """
    best = best_line(lines)
    return sum(EVAL_LOSS in line and line["step"] > best["step"] for line in lines) if best else 0


class HeldOutLoss(TrainerCallback):
    """Measures the held-out sets every few steps, and at the last one.

    Runs before the line of the step is written, so that what it finds is part of it. Nothing random is drawn: the steps
    are those of a run that measures nothing.

    Args:
        trainer: model, objective, batches.
        sets: what to measure.
        events: told what was found.
        lines: of the steps so far.
        watcher: whose clock leaves out the time this takes.
        settings: `TrainSettings.identity()`.
    """

    def __init__(
        self,
        trainer: TokenTrainer,
        sets: Sequence[HeldOutSet],
        events: Events,
        lines: StepLines,
        watcher: StepWatcher,
        settings: dict[str, Any],
    ) -> None:
        self.trainer, self.sets, self.events, self.lines, self.watcher = trainer, sets, events, lines, watcher
        self.every = settings["eval_steps"]
        self.keep_best = bool(settings.get("load_best_model_at_end"))
        self.patience = settings.get("early_stopping_steps")

    def is_over(self) -> bool:
        """Whether the held-out loss has not fallen for as many measurements as the settings allow."""
        known = torch.tensor([float(measured_since_best(self.lines.lines))], device=self.trainer.args.device)
        return self.patience is not None and float(self.trainer.gather(known).max()) >= self.patience

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure where it is time to."""
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        started = time.perf_counter()
        found = self.measure()
        self.trainer.counts.metrics |= found
        before = best_line(self.lines.lines)
        improved = before is None or found[EVAL_LOSS] < before[EVAL_LOSS]
        improved = self._agreed(improved)
        control.should_save |= self.keep_best and improved
        bad = 0 if improved else measured_since_best(self.lines.lines) + 1
        if self.patience is not None and self._agreed(bad >= self.patience):
            control.should_training_stop = control.should_save = True
        self.watcher.clock += time.perf_counter() - started

    def load_best(self, root: Path) -> None:
        """Give the model the weights of the checkpoint with the lowest held-out loss.

        Args:
            root: where the checkpoints are.
        """
        best = best_line(self.lines.lines)  # only the first process has lines
        known = torch.tensor([float(best["step"]) if best else 0.0], device=self.trainer.args.device)
        step = int(self.trainer.gather(known).max())
        if step != self.trainer.state.global_step:
            load_weights(self.trainer.model, root / f"checkpoint-{step}")
            self.events.emit("note", text=f"the weights of step {step} are kept, where the held-out loss was lowest")

    def _agreed(self, answer: bool) -> bool:
        """The first process's answer: only it has the lines."""
        first = torch.tensor([float(answer and self.trainer.args.process_index == 0)], device=self.trainer.args.device)
        return float(self.trainer.gather(first).max()) > 0

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`eval_loss` over all sets, and that of each where there are several, by name."""
        model: Any = self.trainer.model
        training = model.training
        model.eval()
        try:
            totals = [self._totals(model, each) for each in self.sets]
        finally:
            model.train(training)
        together = {unit: (sum(t[unit][0] for t in totals), sum(t[unit][1] for t in totals)) for unit in totals[0]}
        values = {EVAL_LOSS: _mean(together)}
        if len(self.sets) > 1:
            values |= {f"{EVAL_LOSS}/{each.name}": _mean(one) for each, one in zip(self.sets, totals, strict=True)}
        return values

    def _totals(self, model: Any, each: HeldOutSet) -> dict[str, tuple[float, float]]:
        """Unit → sum of the loss and number of units, over all processes."""
        trainer, objective = self.trainer, self.trainer.objective
        loader = make_loader(each.rows, MicroBatchSampler(each.plan, trainer.args.process_index), trainer.collate_rows)
        batches: list[Batch] = list(loader)
        inputs = [trainer._prepare_inputs(batch.inputs) for batch in batches]
        context: Callable[[], Any] = trainer.compute_loss_context_manager
        with context():
            objective.prepare(model, inputs, trainer.gather)
            found: dict[str, torch.Tensor] = {}
            for given, batch in zip(inputs, batches, strict=True):
                counts = objective.counts(batch)
                for unit, value in objective.sums(model, given).loss.items():
                    pair = torch.stack(
                        [value.double(), torch.tensor(float(counts[unit]), device=value.device).double()]
                    )
                    found[unit] = found[unit] + pair if unit in found else pair
        gathered = {unit: trainer.gather(pair[None]).sum(dim=0).tolist() for unit, pair in found.items()}
        return {unit: (loss, count) for unit, (loss, count) in gathered.items()}


def _mean(totals: dict[str, tuple[float, float]]) -> float:
    """The loss: what is counted in different units is divided by its own number and added."""
    return sum(loss / max(count, 1.0) for loss, count in totals.values())
