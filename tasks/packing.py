"""Packing: which rows share a sequence, and how long texts are cut into blocks.

One decision: rows of one length are placed together, so a million rows take as many steps as there are different
lengths, not as there are rows; the result is still that of placing them one by one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Integers = NDArray[numpy.int64]


@dataclass(frozen=True)
class Sequences:
    """Sequences as pieces of rows, all flat: sequence i is pieces `offsets[i]` to `offsets[i + 1]`."""

    offsets: Integers
    """[sequences + 1]"""
    rows: Integers
    """[pieces] the row a piece is of."""
    starts: Integers
    """[pieces] its first token in that row."""
    lengths: Integers
    """[pieces] tokens."""


def one_by_one(rows: Integers, lengths: Integers, wide: int = 1) -> Sequences:
    """Every row a sequence of its own, or every two rows of a pair.

    Args:
        rows: [n] which rows, in order.
        lengths: [n] their tokens.
        wide: rows of a sequence; n is a multiple of it.
    """
    return Sequences(numpy.arange(0, len(rows) + 1, wide), rows, numpy.zeros(len(rows), numpy.int64), lengths)


def pack(rows: Integers, lengths: Integers, capacity: int) -> Sequences:
    """Best-fit decreasing: every row, longest first, goes where the least room is left over.

    Args:
        rows: [n] which rows.
        lengths: [n] their tokens, each at most `capacity`.
        capacity: tokens per sequence.

    Returns:
        Sequences in order of their first row, and the rows in each in order too, so that the order of the data shows
        through as far as packing lets it.

    >>> packed = pack(numpy.arange(4), numpy.array([3, 8, 5, 2]), capacity=10)
    >>> packed.offsets.tolist(), packed.rows.tolist()
    ([0, 2, 4], [0, 2, 1, 3])

    Raises:
        ValueError: a row is longer than a sequence.

    Source: Johnson, "Near-optimal bin packing algorithms", MIT 1973.
    """
    if len(lengths) and lengths.max() > capacity:
        index = int(lengths.argmax())
        raise ValueError(f"row {rows[index]} has {lengths[index]} tokens, a sequence holds {capacity}")
    bins = _bins(lengths, capacity)
    first = numpy.full(int(bins.max(initial=-1)) + 1, len(rows))
    numpy.minimum.at(first, bins, numpy.arange(len(rows)))
    rank = numpy.empty_like(first)
    rank[numpy.argsort(first, kind="stable")] = numpy.arange(len(first))
    order = _stable_order(rank[bins])
    offsets = numpy.concatenate([[0], numpy.cumsum(numpy.bincount(rank[bins], minlength=len(first)))])
    return Sequences(offsets.astype(numpy.int64), rows[order], numpy.zeros(len(rows), numpy.int64), lengths[order])


def _stable_order(keys: Integers) -> Integers:
    """[n] as a stable argsort of keys, none of them negative; three times as fast.

    16 bits at a time, the lowest first: such keys are sorted by counting, larger ones by comparing.
    """
    order = numpy.argsort(keys.astype(numpy.uint16), kind="stable")
    for shift in range(16, int(keys.max(initial=0)).bit_length(), 16):
        order = order[numpy.argsort((keys[order] >> shift).astype(numpy.uint16), kind="stable")]
    return order


def _bins(lengths: Integers, capacity: int) -> Integers:
    """[n] number of the sequence that each row goes to.

    Rooms of equal size are one group, and rows of equal length are placed at once: the smallest room that holds one
    takes `room // length` of them, because what is left over stays the smallest.
    """
    order = _stable_order(lengths.max(initial=0) - lengths)
    ordered = lengths[order]
    bounds = numpy.flatnonzero(numpy.diff(ordered)) + 1
    placed = numpy.empty(len(lengths), numpy.int64)  # in the order of `order`
    rooms: list[int] = []  # sizes of room that there are, ascending
    groups: dict[int, list[Integers]] = {}  # room → sequences that have it
    count = 0

    def leave(room: int, members: Integers) -> None:
        if room and len(members):
            if room not in groups:
                insort(rooms, room)
                groups[room] = []
            groups[room].append(members)

    for start, end in zip([0, *bounds], [*bounds, len(lengths)], strict=True):
        if start == end:
            continue
        length = int(ordered[start])
        while start < end:
            place = bisect_left(rooms, length)
            if place == len(rooms):  # new sequences for all that are left
                each = capacity // length
                number = -(-(end - start) // each)
                room, members = capacity, numpy.arange(count, count + number)
                count += number
            else:
                room = rooms.pop(place)
                members = numpy.concatenate(groups.pop(room))
            each = room // length
            whole = min(len(members), (end - start) // each)
            placed[start : start + whole * each] = numpy.repeat(members[:whole], each)
            leave(room - each * length, members[:whole])
            start += whole * each
            rest = end - start if whole < len(members) else 0  # fewer than one sequence takes
            if rest:
                placed[start:end] = members[whole]
                leave(room - rest * length, members[whole : whole + 1])
                start = end
            leave(room, members[whole + (1 if rest else 0) :])
    result = numpy.empty(len(lengths), numpy.int64)
    result[order] = placed
    return result


def cut_apart(rows: Integers, lengths: Integers, size: int) -> Sequences:
    """Every row cut every `size` tokens; no sequence has tokens of two rows.

    >>> cut = cut_apart(numpy.arange(2), numpy.array([11, 4]), size=8)
    >>> cut.rows.tolist(), cut.starts.tolist(), cut.lengths.tolist()
    ([0, 0, 1], [0, 8, 0], [8, 3, 4])
    """
    counts = -(-lengths // size)
    owner = numpy.repeat(numpy.arange(len(rows)), counts)
    first = numpy.concatenate([[0], numpy.cumsum(counts)])[:-1]
    starts = (numpy.arange(len(owner)) - first[owner]) * size
    return Sequences(numpy.arange(len(owner) + 1), rows[owner], starts, numpy.minimum(lengths[owner] - starts, size))


def blocks(rows: Integers, lengths: Integers, size: int) -> Sequences:
    """All rows one behind the other, cut every `size` tokens; nothing is lost and nothing repeated.

    Args:
        rows: [n] which rows, in order.
        lengths: [n] their tokens.
        size: tokens per sequence; only the last sequence may be shorter.

    >>> cut = blocks(numpy.arange(3), numpy.array([11, 4, 13]), size=8)
    >>> cut.offsets.tolist(), cut.rows.tolist(), cut.starts.tolist(), cut.lengths.tolist()
    ([0, 1, 4, 5, 6], [0, 0, 1, 2, 2, 2], [0, 8, 0, 0, 1, 9], [8, 3, 4, 1, 8, 4])
    """
    rows, lengths = rows[lengths > 0], lengths[lengths > 0]
    ends = numpy.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = numpy.union1d(numpy.concatenate([[0], ends]), numpy.arange(0, total + size, size).clip(max=total))
    begins, lasts = cuts[:-1], cuts[1:]
    owner = numpy.searchsorted(ends, begins, side="right")
    offsets = numpy.concatenate([numpy.flatnonzero(begins % size == 0), [len(begins)]])
    starts = begins - (ends[owner] - lengths[owner]) if total else begins
    return Sequences(offsets.astype(numpy.int64), rows[owner], starts, lasts - begins)
