"""Packing keeps every row once and no sequence above its capacity; blocks keep every token."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy
import pytest

from tasks.packing import Sequences, blocks, cut_apart, one_by_one, pack


def members(found: Sequences) -> list[list[tuple[int, int, int]]]:
    """(row, start, length) of the pieces of each sequence."""
    pieces = list(zip(found.rows.tolist(), found.starts.tolist(), found.lengths.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(found.offsets[:-1].tolist(), found.offsets[1:].tolist(), strict=True)]


def placed_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Tokens in each sequence of best-fit decreasing, row by row: the plain slow way."""
    sums: list[int] = []
    rooms: list[tuple[int, int]] = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            insort(rooms, (capacity - length, len(sums)))
            sums.append(length)
        else:
            room, number = rooms.pop(place)
            sums[number] += length
            insort(rooms, (room - length, number))
    return sorted(sums)


def test_the_worked_examples() -> None:
    packed = pack(numpy.arange(4), numpy.array([3, 8, 5, 2]), capacity=10)
    assert members(packed) == [[(0, 0, 3), (2, 0, 5)], [(1, 0, 8), (3, 0, 2)]]
    assert members(one_by_one(numpy.arange(2), numpy.array([3, 8]))) == [[(0, 0, 3)], [(1, 0, 8)]]


@pytest.mark.parametrize("seed", range(20))
def test_rows_placed_by_length_are_as_tight_as_rows_placed_one_by_one(seed: int) -> None:
    draw = numpy.random.default_rng(seed)
    capacity = int(draw.integers(5, 80))
    lengths = draw.integers(1, 1 + max(1, capacity // int(draw.integers(1, 5))), int(draw.integers(1, 400)))
    packed = members(pack(numpy.arange(len(lengths)), lengths, capacity))
    assert sorted(row for pieces in packed for row, _, _ in pieces) == list(range(len(lengths)))
    assert all(length == lengths[row] for pieces in packed for row, _, length in pieces)
    sums = [sum(length for _, _, length in pieces) for pieces in packed]
    assert sorted(sums) == placed_one_by_one(lengths.tolist(), capacity)
    assert [pieces[0] for pieces in packed] == sorted(pieces[0] for pieces in packed)
    assert all(pieces == sorted(pieces) for pieces in packed)


def test_a_row_longer_than_a_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 has 11 tokens"):
        pack(numpy.arange(2), numpy.array([1, 11]), 10)


def test_blocks_hold_all_tokens_in_order_and_only_the_last_is_short() -> None:
    # documents of 10, 3 and 12 tokens, each with its end of text behind it
    found = members(blocks(numpy.arange(3), numpy.array([11, 4, 13]), 8))
    assert [sum(length for _, _, length in pieces) for pieces in found] == [8, 8, 8, 4]
    tokens = [(row, start + n) for pieces in found for row, start, length in pieces for n in range(length)]
    assert tokens == [(row, n) for row, length in enumerate([11, 4, 13]) for n in range(length)]
    apart = members(cut_apart(numpy.arange(3), numpy.array([11, 4, 16]), 8))
    assert apart == [[(0, 0, 8)], [(0, 8, 3)], [(1, 0, 4)], [(2, 0, 8)], [(2, 8, 8)]]
    assert members(blocks(numpy.arange(0), numpy.zeros(0, numpy.int64), 8)) == []
    assert members(blocks(numpy.arange(2), numpy.array([8, 8]), 8)) == [[(0, 0, 8)], [(1, 0, 8)]]
