"""transformers' Trainer, with our batches and our losses.

One decision: what a step's loss is divided by is counted over the whole step and all processes before its first forward
pass, so the loss is that of the global batch, however it is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from tasks.batch_plan import BatchPlan
from tasks.train.batches import Batch, MicroBatchSampler, make_loader
from tasks.train.objectives import Objective, Sums, trained_tokens
from tasks.train.processes import whole_weights
from tasks.train.resuming import load_weights


@dataclass
class StepCounts:
    """What the current optimizer step holds, over all processes."""

    tokens: int = 0
    trained: int = 0
    samples: int = 0
    """Rows of the data; a packed sequence holds several."""
    squares: int = 0
    """Sum of the squared lengths of its rows, which attention takes time for."""
    units: dict[str, int] = field(default_factory=dict)
    """What losses and metrics are divided by: tokens, pairs, answers."""
    rows: list[int] = field(default_factory=list)
    """Sequences of this process in the step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means of the step that was made last."""


class TokenTrainer(Trainer):
    """Trainer whose loss is that of the global batch.

    Args:
        model: to train.
        args: Trainer's own.
        rows: the sequences, by number.
        plan: which of them make up a step.
        objective: what is minimised.
        collate_rows: rows to a batch.
        lr_ratio: learning rate of LoRA's B matrices as a multiple of the others'.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by what the whole step holds

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        rows: Dataset[Any],
        plan: BatchPlan,
        objective: Objective,
        collate_rows: Callable[[Any], Batch],
        lr_ratio: float | None = None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=rows)
        self.sampler = MicroBatchSampler(plan, args.process_index)
        self.rows, self.collate_rows = rows, collate_rows
        self.objective: Objective = objective
        self.lr_ratio = lr_ratio
        self.counts = StepCounts()
        self._left = 0
        self._coming: list[dict[str, Any]] = []
        self._sums: dict[str, tuple[str, torch.Tensor]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch, counted from 0."""
        self.sampler.set_epoch(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our loader as it is: the plan has already dealt the rows out to processes."""
        return make_loader(self.rows, self.sampler, self.collate_rows)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimizer; with `lr_ratio` LoRA's B matrices have a learning rate of their own.

        Source: Hayou et al. 2024, arXiv:2402.12354: with equal rates A learns too fast for B, or B too slowly.
        """
        optimizer = super().create_optimizer(model)
        if self.lr_ratio is not None:
            assert self.model is not None
            faster = {id(value) for name, value in self.model.named_parameters() if ".lora_B." in name}
            for group in list(optimizer.param_groups):
                own = [value for value in group["params"] if id(value) in faster]
                group["params"] = [value for value in group["params"] if id(value) not in faster]
                if own:
                    rest = {name: value for name, value in group.items() if name != "params"}
                    optimizer.add_param_group(rest | {"params": own, "lr": group["lr"] * self.lr_ratio})
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The micro-batches of one step; what they hold is counted, over all processes."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        found = [self.objective.counts(batch) for batch in batches]
        names = sorted(found[0])
        numbers = [sum(counts[name] for counts in found) for name in names]
        of_batches = [(b.tokens, trained_tokens(b), b.samples, b.squares) for b in batches]
        numbers += [sum(column) for column in zip(*of_batches, strict=True)]
        *units, tokens, trained, samples, squares = self.gather(torch.tensor([numbers], device=device)).sum(0).tolist()
        rows = [row for batch in batches for row in batch.rows]
        self.counts = StepCounts(tokens, trained, samples, squares, dict(zip(names, units, strict=True)), rows)
        self._left, self._sums = num_batches, {}
        self._coming = [batch.inputs for batch in batches]
        return self._coming, torch.tensor(max(trained, 1), device=device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """This process's part of the step's loss, times the processes: all launchers average gradients."""
        if self._coming:  # not where the batches are read: Trainer restores the random state behind that
            self.objective.prepare(model, self._coming, self.gather)
            self._coming = []
        sums = self.objective.sums(model, inputs)
        self._collect(sums)
        # a step in which nothing is trained moves nothing: dividing its loss of 0 by 1 keeps it out of the way
        parts = [value / max(self.counts.units[unit], 1) for unit, value in sums.loss.items()]
        return torch.stack(parts).sum() * self.args.world_size

    def _collect(self, sums: Sums) -> None:
        """Add up the metrics of a step's micro-batches; behind the last one, over all processes."""
        for name, (unit, value) in sums.metrics.items():
            self._sums[name] = (unit, value + self._sums[name][1] if name in self._sums else value)
        self._left -= 1
        if self._left == 0 and self._sums:
            totals = self.gather(torch.stack([value.float() for _, value in self._sums.values()])[None]).sum(dim=0)
            self.counts.metrics = {
                name: total / self.counts.units[unit]
                for (name, (unit, _)), total in zip(self._sums.items(), totals.tolist(), strict=True)
                if self.counts.units[unit]
            }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights of a checkpoint, all of them; Trainer passes over names that it does not find."""
        if self.is_fsdp_enabled:  # accelerate puts the parts back
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, Path(resume_from_checkpoint))

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """One row per process, on every process."""
        return self.accelerator.gather(value) if self.args.world_size > 1 else value

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint, without the pickled arguments that Trainer puts beside them."""
        from tasks.train.output import save_weights

        with whole_weights(self.model, keep=self.args.should_save):
            if self.args.should_save:
                save_weights(self.model, Path(output_dir or str(self.args.output_dir)))
