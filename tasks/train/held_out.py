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
from tasks.train.callbacks import EVAL_LOSS, HELD_OUT, StepLines, StepWatcher, best_line, rank
from tasks.train.resuming import load_weights
from tasks.train.trainer import TokenTrainer

Totals = dict[str, tuple[float, float]]
"""What is counted → its sum, and what it is divided by."""
BETTER = ("rewards/accuracies", "rewards/margins")
"""Metrics of an objective of which more is better."""


@dataclass(frozen=True)
class HeldOutSet:
    """One held-out data set."""

    name: str
    rows: Dataset[Any]
    plan: BatchPlan


def measured_since_best(lines: Sequence[dict[str, Any]], metric: str = EVAL_LOSS) -> int:
    """How many measurements there were since the best one.

    >>> measured_since_best([{"step": 1, "eval_loss": 2.0}, {"step": 2}, {"step": 3, "eval_loss": 2.5}])
    1
    """
    best = best_line(lines, metric)
    return sum(metric in line and line["step"] > best["step"] for line in lines) if best else 0


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
        self.metric = settings.get("metric_for_best_model", EVAL_LOSS)

    def is_over(self) -> bool:
        """Whether the held-out loss has not fallen for as many measurements as the settings allow."""
        since = measured_since_best(self.lines.lines, self.metric)
        known = torch.tensor([float(since)], device=self.trainer.args.device)
        return self.patience is not None and float(self.trainer.gather(known).max()) >= self.patience

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure where it is time to."""
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        started = time.perf_counter()
        found = self.measure()
        self.trainer.counts.metrics |= found
        before = best_line(self.lines.lines, self.metric)
        improved = before is None or rank(found, self.metric) < rank(before, self.metric)
        improved = self._agreed(improved)
        control.should_save |= self.keep_best and improved
        bad = 0 if improved else measured_since_best(self.lines.lines, self.metric) + 1
        if self.patience is not None and self._agreed(bad >= self.patience):
            control.should_training_stop = control.should_save = True
        self.watcher.clock += time.perf_counter() - started

    def load_best(self, root: Path) -> None:
        """Give the model the weights of the checkpoint with the best held-out value.

        Args:
            root: where the checkpoints are.
        """
        best = best_line(self.lines.lines, self.metric)  # only the first process has lines
        known = torch.tensor([float(best["step"]) if best else 0.0], device=self.trainer.args.device)
        step = int(self.trainer.gather(known).max())
        if step != self.trainer.state.global_step:
            load_weights(self.trainer.model, root / f"checkpoint-{step}")
            self.events.note(f"the weights of step {step} are kept, where {self.metric} was best")

    def _agreed(self, answer: bool) -> bool:
        """The first process's answer: only it has the lines."""
        first = torch.tensor([float(answer and self.trainer.args.process_index == 0)], device=self.trainer.args.device)
        return float(self.trainer.gather(first).max()) > 0

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`eval_loss` over all sets, and that of each where there are several, by name; what else pairs tell, over all
        sets."""
        model: Any = self.trainer.model
        training = model.training
        model.eval()
        try:
            found = [self._totals(model, each) for each in self.sets]
        finally:
            model.train(training)
        losses, metrics = [loss for loss, _ in found], [metric for _, metric in found]
        values = {EVAL_LOSS: _mean(_together(losses))}
        if len(self.sets) > 1:
            values |= {f"{EVAL_LOSS}/{each.name}": _mean(one) for each, one in zip(self.sets, losses, strict=True)}
        return values | {f"{HELD_OUT}{name}": _mean({name: pair}) for name, pair in _together(metrics).items()}

    def _totals(self, model: Any, each: HeldOutSet) -> tuple[Totals, Totals]:
        """Unit → sum of the loss and number of units, over all processes; name of a metric → the same of it."""
        trainer, objective = self.trainer, self.trainer.objective
        loader = make_loader(each.rows, MicroBatchSampler(each.plan, trainer.args.process_index), trainer.collate_rows)
        batches: list[Batch] = list(loader)
        inputs = [trainer._prepare_inputs(batch.inputs) for batch in batches]
        context: Callable[[], Any] = trainer.compute_loss_context_manager
        with context():
            objective.prepare(model, inputs, trainer.gather)
            losses, metrics = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
            for given, batch in zip(inputs, batches, strict=True):
                counts, sums = objective.counts(batch), objective.sums(model, given)
                shown = {name: pair for name, pair in sums.metrics.items() if name in BETTER}
                for unit, value in sums.loss.items():
                    _add(losses, unit, value, counts[unit])
                for name, (unit, value) in shown.items():
                    _add(metrics, name, value, counts[unit])
        gathered = [
            {name: trainer.gather(pair[None]).sum(dim=0).tolist() for name, pair in part.items()}
            for part in (losses, metrics)
        ]
        loss, metric = ({name: (pair[0], pair[1]) for name, pair in part.items()} for part in gathered)
        return loss, metric


def _add(found: dict[str, torch.Tensor], name: str, value: torch.Tensor, count: int) -> None:
    pair = torch.stack([value.double(), torch.tensor(float(count), device=value.device).double()])
    found[name] = found[name] + pair if name in found else pair


def _together(parts: Sequence[Totals]) -> Totals:
    """Totals of several sets as one."""
    return {name: (sum(part[name][0] for part in parts), sum(part[name][1] for part in parts)) for name in parts[0]}


def _mean(totals: Totals) -> float:
    """The loss: what is counted in different units is divided by its own number and added."""
    return sum(loss / max(count, 1.0) for loss, count in totals.values())
