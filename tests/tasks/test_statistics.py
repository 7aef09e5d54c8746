"""Statistics of a tokenize step: every row is in one bar, and the picture is one."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy
import pytest

from tasks.statistics import describe_lengths, draw_statistics


@pytest.mark.parametrize(
    "lengths", [[1], [7, 7, 7], [1, 2048], list(range(1, 300)), [900, 901, 902] * 5, [0, 3]], ids=lambda v: str(v[:3])
)
def test_the_histogram_adds_up_to_the_rows(lengths: list[int]) -> None:
    found = describe_lengths(numpy.array(lengths))
    edges, rows = found["histogram"]["edges"], found["histogram"]["rows"]
    assert sum(rows) == len(lengths)
    assert len(edges) == len(rows) + 1 <= 41
    assert edges == sorted(set(edges))
    assert rows == [sum(a <= n < b for n in lengths) for a, b in pairwise(edges)]
    assert (found["shortest"], found["longest"]) == (min(lengths), max(lengths))
    assert found["shortest"] <= found["median"] <= found["percentile_95"] <= found["longest"]


def test_median_and_percentile_are_lengths_of_rows() -> None:
    found = describe_lengths(numpy.arange(1, 101))
    assert (found["median"], found["percentile_95"]) == (51, 95)


def statistics(lengths: list[int], **changed: Any) -> dict[str, Any]:
    """What a tokenize step writes."""
    total = sum(lengths)
    counts = {"rows": len(lengths), "sequences": len(lengths), "tokens": total, "trained_tokens": total // 3}
    others = {"truncated": 0, "filled": None, "left_out": {}, "rows_read": len(lengths), "library": "fastokens"}
    return counts | others | describe_lengths(numpy.array(lengths, numpy.int64)) | changed


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[12:16] == b"IHDR"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


@pytest.mark.parametrize(
    ("given", "title"),
    [
        (statistics([3, 5, 9] * 50), "sft/tokenize"),
        (statistics([8], truncated=1, filled=0.5), "sft/tokenize:数据 $a_$b $"),
        (statistics([5], left_out={"too_long": 7, "no_trained_tokens": 1}, rows_read=9), ""),
        (statistics([]), "nothing"),
    ],
    ids=["many", "odd title", "left out", "empty"],
)
def test_a_picture_is_a_png_of_sensible_size_and_draws_without_a_warning(given: dict[str, Any], title: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = draw_statistics(given, title)
    assert size(png) == (990, 396)
    assert 5_000 < len(png) < 100_000


def test_steps_that_end_at_once_draw_what_each_would_alone() -> None:
    given = [statistics([n, 2 * n, 50]) for n in range(1, 5)]
    alone = [draw_statistics(one, "title") for one in given]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda one: draw_statistics(one, "title"), given)) == alone
