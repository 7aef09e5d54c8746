"""How sure a measured number is: 95 % intervals by the bootstrap.

One decision: what is drawn again are rows, as a data set is a draw of rows; the tokens of a row stay together. Every
number here is a function of sums over rows (a perplexity of two, a calibration error of eleven), and the draws depend
on nothing but how many rows there are. So two models measured on the same rows are drawn alike, and the interval of
their difference is one of paired rows.

Legend: r rows, k sums, n draws.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 8 and 13 (percentiles).
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

DRAWS, SEED = 2000, 20
LEAST_ROWS = 2  # with an interval: drawn from one row, every draw is that row, and nothing would seem surer
MOST = 5000  # rows that are drawn one by one; of more, neighbours are drawn together
TOGETHER = 200  # draws at once
LOW, HIGH = 2.5, 97.5  # per cent
Array = NDArray[numpy.float64]


def drawn_sums(rows: Array) -> Array:
    """Sums over rows that are drawn with replacement, as many as there are.

    Args:
        rows: [r, k] what each row adds to each sum.

    Returns:
        [n, k].
    """
    if len(rows) > MOST:
        starts = numpy.linspace(0, len(rows), MOST, endpoint=False).astype(numpy.int64)
        rows = numpy.add.reduceat(rows, starts, axis=0)
    random, found = numpy.random.default_rng([SEED, len(rows)]), []
    for _ in range(DRAWS // TOGETHER):
        chosen = random.integers(0, len(rows), (TOGETHER, len(rows)))
        counts = numpy.stack([numpy.bincount(draw, minlength=len(rows)) for draw in chosen])
        found.append(counts @ rows)
    return numpy.concatenate(found)


def limits(values: Array) -> dict[str, float]:
    """`low` and `high`: between them are 95 % of some drawn values, [n]; those that are no number are left out."""
    low, high = numpy.nanpercentile(values, [LOW, HIGH])
    return {"low": float(low), "high": float(high)}


def drawn_ratios(tops: Array, bottoms: Array) -> Array:
    """Ratios of two sums, [n].

    Args:
        tops, bottoms: [r].
    """
    sums = drawn_sums(numpy.stack([tops, bottoms], axis=1).astype(numpy.float64))
    return numpy.divide(sums[:, 0], sums[:, 1], out=numpy.full(len(sums), numpy.nan), where=sums[:, 1] != 0)
