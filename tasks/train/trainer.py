"""transformers' Trainer, with our batches and our loss.

One decision: logits are made only where a label is trained, by handing the model's own forward a mask of positions
(`logits_to_keep`). The call still goes through every wrapper (PEFT, DistributedDataParallel), so their hooks run.

Legend: b batch, s sequence, n trained positions, v vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from tasks.train.batches import IGNORED, Batch, BatchPlan, MicroBatchSampler, Rows, make_loader


@dataclass
class StepCounts:
    """Tokens of the current optimizer step, over all processes."""

    tokens: int = 0
    trained: int = 0


def token_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Sum of the negative log likelihood over the trained tokens of one forward pass.

    Position i predicts the token at i + 1. Logits are (n, v) instead of (b, s, v): with half of the labels trained that
    is half of the memory and time of the output head, the largest matrix product of a small model. The cross entropy
    is computed in float32.

    Args:
        model: the model, wrapped or not.
        inputs: what `batches.collate` makes, on the model's device.

    Returns:
        float32 scalar; 0 with a gradient of zeros when no label is trained.
    """
    arguments = dict(inputs)
    following = arguments.pop("labels")[:, 1:]
    kept = torch.zeros_like(arguments["input_ids"], dtype=torch.bool)
    kept[:, :-1] = following != IGNORED
    if keeps_masked_positions(model):
        logits = model(**arguments, logits_to_keep=kept).logits
    else:
        logits = model(**arguments).logits[kept]
    return cross_entropy(logits.float(), following[following != IGNORED], reduction="sum")


def keeps_masked_positions(model: Any) -> bool:
    """Whether the model's forward takes a (b, s) bool `logits_to_keep`: it does where transformers' helper is used."""
    inner = model
    while hasattr(inner, "module"):  # DistributedDataParallel
        inner = inner.module
    if hasattr(inner, "get_base_model"):  # PEFT
        inner = inner.get_base_model()
    return hasattr(sys.modules[type(inner).__module__], "slice_logits_to_keep")


class TokenTrainer(Trainer):
    """Trainer whose loss is the sum over trained tokens / number of trained tokens in the global batch."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

    def __init__(self, model: Any, args: TrainingArguments, rows: Rows, plan: BatchPlan, packing: bool) -> None:
        super().__init__(model=model, args=args, train_dataset=rows)
        self.sampler = MicroBatchSampler(plan, args.process_index)
        self.rows = rows
        self.packing = packing
        self.counts = StepCounts()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our loader as it is: the plan has already dealt the rows out to processes."""
        return make_loader(self.rows, self.sampler, self.packing)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The micro-batches of one step, and how many tokens of the step are trained, over all processes."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        trained = sum(int((batch.inputs["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        counts = torch.tensor([[trained, sum(batch.tokens for batch in batches)]], device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts)
        trained, tokens = counts.sum(dim=0).tolist()
        self.counts.trained, self.counts.tokens = trained, tokens
        # A step in which nothing is trained moves nothing: dividing its loss of 0 by 1 keeps it out of the way.
        return [batch.inputs for batch in batches], torch.tensor(max(trained, 1), device=device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """This process's part of the step's loss, times the processes: DistributedDataParallel averages gradients."""
        return token_loss(model, inputs) / max(self.counts.trained, 1) * self.args.world_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights of a checkpoint, without the pickled arguments that Trainer puts beside them."""
        from tasks.train.output import save_weights

        if self.args.should_save:
            save_weights(self.model, Path(output_dir or str(self.args.output_dir)))
