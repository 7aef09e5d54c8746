"""Numbers of several models with their intervals, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of models; seven that people with any eyes tell apart (Okabe and Ito 2008)."""
MARKS = "osD^vPX"


def draw_numbers(rows: Sequence[tuple[str, Sequence[Mapping[str, Any] | None]]], names: Sequence[str]) -> bytes:
    """Every number of every model with its interval, as a PNG; each metric has a scale of its own.

    Args:
        rows: metric and set → result of every model (`value`, `rows` and, where they are known, `low` and `high`); None
            where it has none.
        names: of the models.
    """
    count = len(names)
    figure = new_figure(8.0, 0.5 + len(rows) * (0.45 + 0.22 * count))
    for axes, (title, results) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        for number, result in enumerate(results):
            if result is None:
                continue
            low, high = (result.get(end, result["value"]) for end in ("low", "high"))
            colour = COLOURS[number % len(COLOURS)]
            axes.plot([low, high], [-number, -number], color=colour, linewidth=2.0)
            axes.plot(result["value"], -number, MARKS[number % len(MARKS)], color=colour)
        axes.set_yticks([-n for n in range(count)], names)
        axes.set_ylim(-count + 0.4, 0.6)
        axes.grid(axis="x", alpha=0.25)
        counted = next(result["rows"] for result in results if result is not None)
        axes.set_title(f"{title}, {counted:,} rows", fontsize=9, loc="left")
    return as_png(figure)


def draw_results(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes | None:
    """The picture of what a run measured: label → metric and set → result; None where nothing has an interval."""
    measured = {label: {k: v for k, v in found.items() if "low" in v} for label, found in results.items()}
    names = [label for label, found in measured.items() if found]
    metrics = dict.fromkeys(metric for found in measured.values() for metric in found)
    if not names:
        return None
    return draw_numbers([(m, [measured[name].get(m) for name in names]) for m in metrics], names)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches; without pyplot: it takes half a second, and no window system is looked for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Any) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
