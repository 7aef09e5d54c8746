"""Mixtures: in which order, and how often, the rows of several data sets are seen in one epoch.

One decision: a mixture is an order over tokenized rows. No row is copied, so changing shares costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

Integers = NDArray[numpy.int64]
DRAWS = 1 << 16  # data sets drawn at a time


def mixed(rows: Sequence[Integers], mixture: dict[str, Any]) -> Integers:
    """The rows of one epoch, in order.

    Args:
        rows: for each data set its rows, in order.
        mixture: `repeats` (for each data set, how many times its rows are seen), `strategy` (`concat`: one data set
            behind the other; `interleave_under`: drawn at random until one of them has no more; `interleave_over`:
            until every one has been seen whole, those that are through beginning again), and for the latter two
            `probabilities` and `seed`.

    >>> mixed([numpy.array([0, 1]), numpy.array([2])], {"repeats": [1, 2], "strategy": "concat"}).tolist()
    [0, 1, 2, 2]

    Source: the strategies are those of Hugging Face's `interleave_datasets` (`first_exhausted`, `all_exhausted`), by
    LLaMA-Factory's names.
    """
    seen = [numpy.tile(own, times) for own, times in zip(rows, mixture["repeats"], strict=True)]
    if mixture["strategy"] == "concat" or len(seen) < 2:
        return numpy.concatenate([numpy.zeros(0, numpy.int64), *seen])
    sizes = numpy.array([len(own) for own in seen])
    if not sizes.all():  # one of which no row is left: there is nothing to draw from it
        return mixed([own for own in seen if len(own)], _without_empty(mixture, sizes))
    drawn = _draws(sizes, mixture)
    result = numpy.empty(len(drawn), numpy.int64)
    for number, own in enumerate(seen):
        mine = drawn == number
        result[mine] = own[numpy.arange(int(mine.sum())) % len(own)]
    return result


def _without_empty(mixture: dict[str, Any], sizes: Integers) -> dict[str, Any]:
    left = numpy.flatnonzero(sizes)
    shares = [mixture["probabilities"][number] for number in left]
    return mixture | {"repeats": [1] * len(left), "probabilities": shares}


def _draws(sizes: Integers, mixture: dict[str, Any]) -> NDArray[numpy.int64]:
    """Numbers of the data sets in the order drawn, up to where the strategy stops."""
    draw = numpy.random.default_rng(mixture["seed"])
    shares = numpy.array(mixture["probabilities"], numpy.float64)
    shares = shares / shares.sum()
    drawn = numpy.zeros(0, numpy.int64)
    counts = numpy.zeros(len(sizes), numpy.int64)
    enough = numpy.any if mixture["strategy"] == "interleave_under" else numpy.all
    while not enough(counts >= sizes):
        more = draw.choice(len(sizes), DRAWS, p=shares)
        drawn = numpy.concatenate([drawn, more])
        counts += numpy.bincount(more, minlength=len(sizes))
    ends = [numpy.flatnonzero(drawn == n)[size - 1] for n, size in enumerate(sizes) if counts[n] >= size]
    stop = min(ends) if mixture["strategy"] == "interleave_under" else max(ends)
    return drawn[: int(stop) + 1]
