"""From tokenized shards to batches.

One decision: an epoch is cut into global batches of rows first, and only then dealt out to processes and
micro-batches. So the rows of a step do not depend on how the step is split, and the last, shorter step of an epoch
repeats nobody (a sampler sharded per process fills up with rows from the beginning).

Legend: b batch, s sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from tasks.program import ProgramError
from tasks.sequences import IGNORED, TokenizedSequences

FILLER = -1  # index of the row that keeps a process busy when a step has fewer rows than micro-batches
NO_ROWS = "there are no rows to train on; the report of the tokenize step says what was left out and why"


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a run, and which row goes where.

    >>> BatchPlan(rows=10, per_device=1, accumulation=2, processes=2, seed=0).steps_per_epoch()
    3
    """

    rows: int
    """Sequences in the shards."""
    per_device: int
    """Sequences per process in one forward pass."""
    accumulation: int
    """Forward passes per optimizer step."""
    processes: int
    """Training processes."""
    seed: int
    """Seed of the order."""

    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.per_device * self.accumulation * self.processes

    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows; the last one may be short."""
        return math.ceil(self.rows / self.global_batch())

    def total_steps(self, max_steps: int | None, epochs: float | None) -> int:
        """Optimizer steps of the run: `max_steps`, or what `epochs` passes need, rounded up."""
        return max_steps if max_steps is not None else math.ceil((epochs or 0.0) * self.steps_per_epoch())

    def sentence(self, total: int) -> str:
        """The arithmetic, said once at the start."""
        one = "process" if self.processes == 1 else "processes"
        return (
            f"{self.per_device} per device x {self.accumulation} accumulation x {self.processes} {one} = "
            f"{self.global_batch()} sequences per step; {self.rows} sequences, "
            f"{self.steps_per_epoch()} steps per epoch; total {total} steps"
        )

    def order(self, epoch: int) -> list[int]:
        """The rows of one epoch in the order they are trained on."""
        return [int(row) for row in numpy.random.default_rng([self.seed, epoch]).permutation(self.rows)]

    def micro_batches(self, epoch: int, process: int) -> Iterator[list[int]]:
        """The rows of each forward pass of one process.

        Five rows, 1 per device, accumulation 2, 1 process, order 3 0 4 1 2: `[3] [0]`, `[4] [1]`, `[2] [FILLER]`.
        """
        order = self.order(epoch)
        for start in range(0, self.rows, self.global_batch()):
            step = order[start : start + self.global_batch()]
            for number in range(process, self.accumulation * self.processes, self.processes):
                yield step[number * self.per_device : (number + 1) * self.per_device] or [FILLER]


class MicroBatchSampler:
    """The batch sampler of one process; `set_epoch` chooses the order."""

    def __init__(self, plan: BatchPlan, process: int) -> None:
        self.plan = plan
        self.process = process
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch, counted from 0, at the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.micro_batches(self.epoch, self.process)

    def __len__(self) -> int:
        return self.plan.steps_per_epoch() * self.plan.accumulation


class Rows(Dataset[dict[str, Any]]):
    """The sequences of a tokenize artifact, checked as they are read.

    Args:
        folder: the artifact, see `tasks.sequences`.
        vocabulary: number of token ids of the model.
        pieces: texts of a sequence that keeps a process busy: two where pairs are compared.

    Raises:
        ProgramError: `bad_setting` when there are no rows, or a row does not fit the model.
    """

    def __init__(self, folder: str, vocabulary: int, pieces: int = 1) -> None:
        self.pieces = pieces
        self.data = TokenizedSequences(Path(folder))
        if len(self.data) == 0:
            raise ProgramError("bad_setting", NO_ROWS)
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sequence, as `input_ids`, `labels` and `seq_lengths`, int64 each; `row` its number; `mark` of its row."""
        if index == FILLER:
            return filler(self.pieces)
        found = self.data[index]
        row = {name: numpy.asarray(value, dtype=numpy.int64) for name, value in found._asdict().items()}
        highest = int(max(row["input_ids"].max(), row["labels"].max()))
        if highest >= self.vocabulary:
            raise ProgramError(
                "bad_setting",
                f"row {index} holds token id {highest}, the model has {self.vocabulary}: "
                "the shards were made with another tokenizer",
            )
        return row | {"row": index, "mark": self.data.rows.mark(self.data.rows_of(index)[0])}


def filler(pieces: int = 1) -> dict[str, Any]:
    """What keeps a process busy when a step has fewer rows than micro-batches: nothing of it is trained or counted."""
    zeros = numpy.zeros(pieces, numpy.int64)
    return {"row": FILLER, "input_ids": zeros, "labels": zeros + IGNORED, "seq_lengths": zeros + 1}


@dataclass(frozen=True)
class Batch:
    """One forward pass: what the model gets, and what was in it."""

    inputs: dict[str, Any]
    """Arguments of the model's forward, `labels` included, and what else the stage's objective reads."""
    tokens: int
    """Tokens of real rows, pads not counted."""
    rows: list[int] = field(default_factory=list)
    """Numbers of the sequences in it."""


def collate(rows: list[dict[str, Any]], packing: bool) -> Batch:
    """Put rows side by side, padded on the right.

    The label of a row's first token is always `IGNORED`: nothing before it in the same row predicts it. Pads are known
    by position, never by token id, so a pad token that equals the end token does no harm.

    Rows `[5 6 7]` and `[8 9]`, all labels trained, not packed::

        input_ids       5    6    7        8    9    0
        labels       -100    6    7     -100    9 -100
        attention_mask  1    1    1        1    1    0

    The same two rows packed into one sequence (`seq_lengths [3, 2]`), next to a pack of `[4 3]` alone::

        input_ids       5    6    7    8    9        4    3    0    0    0
        labels       -100    6    7 -100    9     -100    3 -100 -100 -100
        position_ids    0    1    2    0    1        0    1    0    1    2

    A packed batch has no attention mask and makes no cache: either would switch off the model's own separation of
    rows, in silence. The pads of a shorter pack are one more row that nothing is trained on.

    Args:
        rows: `input_ids`, `labels`, `seq_lengths` of equal total length each, and `row`.
        packing: rows hold several rows.

    Returns:
        `input_ids`, `labels` and `attention_mask` or `position_ids`, each (b, s) int64; `use_cache` False.
    """
    size = (len(rows), max(len(row["input_ids"]) for row in rows))
    ids, labels = torch.zeros(size, dtype=torch.int64), torch.full(size, IGNORED, dtype=torch.int64)
    positions, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    for at, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[at, :length] = torch.as_tensor(row["input_ids"])
        labels[at, :length] = torch.as_tensor(row["labels"])
        mask[at, :length] = 1
        start = 0
        for part in [*(int(part) for part in row["seq_lengths"]), size[1] - length]:
            labels[at, start : start + 1] = IGNORED
            positions[at, start : start + part] = torch.arange(part)
            start += part
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels, "use_cache": False}
    inputs |= {"position_ids": positions} if packing else {"attention_mask": mask}
    real = [row for row in rows if row.get("row") != FILLER]
    return Batch(inputs, sum(len(row["input_ids"]) for row in real), [row.get("row", FILLER) for row in real])


def make_loader(
    rows: Dataset[Any], sampler: MicroBatchSampler, collate_rows: Callable[[Any], Batch]
) -> DataLoader[Any]:
    """The loader of one process. It draws from a generator of its own, never from the global one dropout uses."""
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate_rows, generator=torch.Generator())
