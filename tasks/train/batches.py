"""From tokenized shards to batches.

One decision: which rows are a batch is decided in `tasks.batch_plan`; here they are read, checked and put side by side.

Legend: b batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from tasks.batch_plan import FILLER, BatchPlan
from tasks.program import ProgramError
from tasks.sequences import IGNORED, TokenizedSequences

NO_ROWS = "there are no rows to train on; the report of the tokenize step says what was left out and why"


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
        """The sequence, as `input_ids`, `labels` and `seq_lengths`, int64 each; `row` its number; `mark` of its row;
        `samples`, the texts that begin in it."""
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
        mark = self.data.rows.mark(self.data.rows_of(index)[0])
        return row | {"row": index, "mark": mark, "samples": self.data.begun(index)}


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
    samples: int = 0
    """Rows of the data in it: a packed sequence holds several, a pair is one."""
    squares: int = 0
    """Sum of the squared lengths of its rows."""


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
    return Batch(
        inputs,
        tokens=sum(len(row["input_ids"]) for row in real),
        rows=[row.get("row", FILLER) for row in real],
        samples=sum(row.get("samples", len(row["seq_lengths"])) for row in real),
        squares=sum(int(part) ** 2 for row in real for part in row["seq_lengths"]),
    )


def make_loader(
    rows: Dataset[Any], sampler: MicroBatchSampler, collate_rows: Callable[[Any], Batch]
) -> DataLoader[Any]:
    """The loader of one process. It draws from a generator of its own, never from the global one dropout uses."""
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate_rows, generator=torch.Generator())
