"""Lengths of tokenized rows in numbers and as a picture."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tasks.artifacts import Artifact
    from tasks.steps import Step

STATISTICS = "statistics.json"
BARS = 40
SAID = {"median": "median", "percentile_95": "95 % up to"}
DRAWING = threading.Lock()  # steps end in threads, and matplotlib is for one at a time


def describe_lengths(lengths: NDArray[numpy.int64]) -> dict[str, Any]:
    """Shortest, median, 95th percentile and longest row in tokens, and a histogram.

    Returns:
        `histogram` is `{"edges": [bars + 1] tokens, "rows": [bars]}`: bar i counts the rows from edge i up to, and
        without, edge i + 1.
    """
    if not len(lengths):
        return {"shortest": 0, "median": 0, "percentile_95": 0, "longest": 0, "histogram": {"edges": [0], "rows": []}}
    ordered = numpy.sort(lengths)
    longest = int(ordered[-1])
    edges = numpy.unique(numpy.linspace(0, longest + 1, min(BARS, longest + 1) + 1).astype(numpy.int64))
    return {
        "shortest": int(ordered[0]),
        "median": int(ordered[len(ordered) // 2]),
        "percentile_95": int(ordered[(95 * len(ordered) + 99) // 100 - 1]),
        "longest": longest,
        "histogram": {"edges": edges.tolist(), "rows": numpy.diff(numpy.searchsorted(ordered, edges)).tolist()},
    }


def statistics_picture(step: Step, artifact: Artifact) -> bytes:
    """The picture of what a tokenize step made; drawn once, for Prefect's page and for MLflow."""
    return _picture((artifact.path / STATISTICS).read_text(encoding="utf-8"), step.title)


@lru_cache(maxsize=8)
def _picture(statistics: str, title: str) -> bytes:
    return draw_statistics(json.loads(statistics), title)


def draw_statistics(statistics: Mapping[str, Any], title: str) -> bytes:
    """A PNG: rows by length, and where the tokens and the rows that were read went.

    Args:
        statistics: what a tokenize step writes to statistics.json.
        title: of the picture.
    """
    # here, and without pyplot: it takes half a second, and no window system is looked for
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with DRAWING:
        figure = Figure(figsize=(9, 3.6), facecolor="white")
        # fixed: to measure every text first takes as long as to draw; between the two stand the names of the bars
        figure.subplots_adjust(0.08, 0.14, 0.97, 0.88, wspace=0.62)
        FigureCanvasAgg(figure)
        figure.suptitle(_drawable(title), parse_math=False)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_lengths(left, statistics)
        _draw_shares(right, statistics)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_lengths(axes: Any, statistics: Mapping[str, Any]) -> None:
    """The histogram, with median and 95th percentile."""
    edges, rows = statistics["histogram"]["edges"], statistics["histogram"]["rows"]
    highest = max(rows, default=1)
    if rows:
        axes.stairs(rows, edges, fill=True, color="tab:blue", alpha=0.75)
    axes.set(xlabel="tokens per row", ylabel="rows", xlim=(0, max(1, edges[-1])), ylim=(0, 1.25 * highest))
    axes.yaxis.get_major_locator().set_params(integer=True)
    for name, height, line in (("median", 1.22, "--"), ("percentile_95", 1.12, ":")):
        place = statistics[name]
        axes.axvline(place, color="black", linewidth=1, linestyle=line)
        right = place > 0.6 * edges[-1]  # the words go where there is room
        axes.annotate(
            f" {SAID[name]} {place:,} ",
            (place, height * highest),
            va="top",
            ha="right" if right else "left",
            fontsize=8,
        )


def _draw_shares(axes: Any, statistics: Mapping[str, Any]) -> None:
    """Bars of percents: tokens that are trained, rows left out by reason, how full sequences are."""
    tokens, read = max(1, statistics["tokens"]), max(1, statistics["rows_read"])
    bars = [("trained", f"of {statistics['tokens']:,} tokens", statistics["trained_tokens"] / tokens, "tab:green")]
    for reason, count in statistics["left_out"].items():
        words = reason.replace("_", " ")
        bars.append((f"left out: {words}", f"{count:,} of {read:,} rows", count / read, "tab:red"))
    if statistics["truncated"]:
        rows = max(1, statistics["rows"])
        said = f"{statistics['truncated']:,} of {rows:,} rows"
        bars.append(("cut short", said, statistics["truncated"] / rows, "tab:orange"))
    if statistics["filled"] is not None:
        said = f"{statistics['sequences']:,} sequences"
        bars.append(("filled", said, statistics["filled"], "tab:gray"))
    places = range(len(bars))
    axes.barh(places, [100 * share for _, _, share, _ in bars], color=[color for *_, color in bars], height=0.6)
    axes.set_yticks(places, [f"{what}\n{of}" for what, of, _, _ in bars], fontsize=8)
    for place, (_, _, share, _) in enumerate(bars):
        inside = share > 0.8
        axes.annotate(
            f" {100 * share:.1f} % ",
            (100 * share, place),
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            fontsize=8,
        )
    # one bar alone would be as thick as the picture
    axes.set(xlim=(0, 100), xlabel="%", ylim=(max(len(bars), 3) - 0.5, -0.5))


def _drawable(title: str) -> str:
    """A title in letters of the font that comes with matplotlib: Latin, Greek and Cyrillic."""
    return "".join(letter if letter.isprintable() and ord(letter) < 0x530 else "?" for letter in title)
