"""Packing: which rows share a sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: every row, longest first, goes where the least room is left over.

    Args:
        lengths: tokens per row, each at most `capacity`.
        capacity: tokens per sequence.

    Returns:
        Rows (indices) per sequence. Sequences are in order of their first row, and so are the rows in each, so that the
        order of the data shows through as far as packing lets it.

    >>> pack([3, 8, 5, 2], capacity=10)
    [[0, 2], [1, 3]]

    Raises:
        ValueError: a row is longer than a sequence.

    Source: Johnson, "Near-optimal bin packing algorithms", MIT 1973.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"row {index} has {length} tokens, a sequence holds {capacity}")
        place = bisect_left(room, (length, -1))
        if place == len(room):
            insort(room, (capacity - length, len(bins)))
            bins.append([index])
        else:
            left, number = room.pop(place)
            bins[number].append(index)
            insort(room, (left - length, number))
    return sorted(sorted(rows) for rows in bins)
