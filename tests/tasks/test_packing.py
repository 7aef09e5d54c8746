"""Packing keeps every row once and no sequence above its capacity."""

from __future__ import annotations

import random

import pytest

from tasks.packing import pack


def test_the_worked_example() -> None:
    assert pack([3, 8, 5, 2], capacity=10) == [[0, 2], [1, 3]]


def test_every_row_is_in_exactly_one_sequence_and_all_fit() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 64) for _ in range(2000)]
    packs = pack(lengths, 64)
    assert sorted(row for rows in packs for row in rows) == list(range(2000))
    assert max(sum(lengths[row] for row in rows) for rows in packs) <= 64
    assert sum(lengths) / (len(packs) * 64) > 0.97


def test_a_row_longer_than_a_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 has 11 tokens"):
        pack([1, 11], 10)
