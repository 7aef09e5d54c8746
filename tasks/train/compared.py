"""Batches of answers that are compared: pairs, and answers marked as good or bad.

One decision: the two answers of a pair go through the model in one forward pass, preferred ones first, so that both see
the same weights and one wrapper call; a row that only keeps a process busy weighs nothing.

Legend: p pairs or marked answers, s sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset

from tasks.batch_plan import FILLER, BatchPlan
from tasks.program import ProgramError
from tasks.sequences import IGNORED
from tasks.train.batches import Batch, Rows, collate

Row = dict[str, Any]


def collate_pairs(rows: list[Row]) -> Batch:
    """Pairs side by side: the preferred answers of all of them, then the others, padded on the right.

    Pairs `[1 2 | 1 3 3]` and `[4 5 5 | 4 6]`, written as sequences of two pieces::

        input_ids   1 2 0    4 5 5    1 3 3    4 6 0

    Args:
        rows: `input_ids`, `labels`, `seq_lengths` of two pieces, `row` and `mark` (the margin, or None).

    Returns:
        `input_ids`, `labels`, `attention_mask`, each (2p, s) int64; `real` (p,) float32, 1 for a pair and 0 for what
        keeps a process busy; `margin` (p,) float32.
    """
    halves = [[_half(row, 0) for row in rows], [_half(row, 1) for row in rows]]
    batch = collate([*halves[0], *halves[1]], packing=False)
    margins = [row.get("mark") or 0.0 for row in rows]
    beside = {"real": _real(rows), "margin": torch.tensor(margins, dtype=torch.float32)}
    return replace(batch, inputs=batch.inputs | beside, rows=_numbers(rows), samples=len(_numbers(rows)))


def collate_marked(rows: list[Row]) -> Batch:
    """Marked answers side by side, and beside them the answers that estimate the distance to the reference.

    Args:
        rows: `input_ids`, `labels`, `row`, `mark` (bool) and `other`: the same prompt with another row's answer.

    Returns:
        `input_ids`, `labels`, `attention_mask`, each (p, s) int64; `real` (p,) float32; `good` (p,) bool; `other`: the
        same three tensors for the prompts with other answers.
    """
    batch = collate(rows, packing=False)
    other = collate([row["other"] | {"row": row["row"]} for row in rows], packing=False)
    beside = {
        "real": _real(rows),
        "good": torch.tensor([bool(row.get("mark")) for row in rows]),
        "other": other.inputs,
    }
    return replace(batch, inputs=batch.inputs | beside, rows=_numbers(rows))


class MarkedRows(Dataset[Row]):
    """Marked answers, each with the answer of the row behind it in the epoch's order.

    KTO estimates how far the policy is from its reference on prompts with answers that are not theirs. Which answer
    that is depends on the order alone, so it does not change with the size of a batch, and a batch of one has one too.

    Args:
        rows: the sequences of a labelled set.
        plan: the order of each epoch.

    Raises:
        ProgramError: `bad_setting` when there is one row only.
    """

    def __init__(self, rows: Rows, plan: BatchPlan) -> None:
        if len(rows) < 2:
            raise ProgramError(
                "bad_setting", "stage kto compares each answer with another row's; there is one row only"
            )
        self.rows, self.plan = rows, plan
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Pair the rows as the order of this epoch, counted from 0, has them."""
        order = self.plan.order(epoch)
        self.partner = dict(zip(order, [*order[1:], order[0]], strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        if index == FILLER:
            return row | {"other": row}
        return row | {"other": with_answer_of(row, self.rows[self.partner[index]])}


def with_answer_of(row: Row, other: Row) -> Row:
    """The prompt of one row with the answer of another; an answer begins at the first trained token.

    >>> one = {"input_ids": numpy.array([1, 2, 3]), "labels": numpy.array([-100, -100, 3])}
    >>> two = {"input_ids": numpy.array([4, 5, 6]), "labels": numpy.array([-100, 5, 6])}
    >>> with_answer_of(one, two)["input_ids"].tolist()
    [1, 2, 5, 6]
    """
    prompt = row["input_ids"][: _answer_start(row)]
    start = _answer_start(other)
    ids = numpy.concatenate([prompt, other["input_ids"][start:]])
    labels = numpy.concatenate([numpy.full(len(prompt), IGNORED), other["labels"][start:]])
    return {"input_ids": ids, "labels": labels, "seq_lengths": numpy.array([len(ids)])}


def _answer_start(row: Row) -> int:
    return int(numpy.flatnonzero(row["labels"] != IGNORED)[0])


def _half(row: Row, part: int) -> Row:
    """One answer of a pair."""
    border = int(row["seq_lengths"][0])
    cut = slice(0, border) if part == 0 else slice(border, None)
    lengths = row["seq_lengths"][part : part + 1]
    return {"row": row["row"], "input_ids": row["input_ids"][cut], "labels": row["labels"][cut], "seq_lengths": lengths}


def _real(rows: list[Row]) -> torch.Tensor:
    return torch.tensor([float(row["row"] != FILLER) for row in rows])


def _numbers(rows: list[Row]) -> list[int]:
    return [row["row"] for row in rows if row["row"] != FILLER]
