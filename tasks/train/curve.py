"""The loss curve as a picture.

One decision: matplotlib's figure classes are used without pyplot: no window system is looked for and nothing
global is left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def new_figure() -> tuple[Any, Any]:
    """A figure and its axes, with room on both sides for a scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), dpi=110)
    figure.subplots_adjust(0.11, 0.13, 0.89, 0.9)  # fixed: to measure every text first takes as long as to draw
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    return figure, axes


def draw_curve(lines: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draw loss (left) and learning rate (right) over optimizer steps.

    Args:
        lines: `step`, `loss` and `learning_rate` of every step to show, and `eval_loss` where it was measured.
        path: the PNG to write.
        title: shown above the curve.
    """
    figure, axes = new_figure()
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1.0, marker="." if len(steps) < 30 else None)
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8)
    measured = [line for line in lines if "eval_loss" in line]
    if measured:
        points = [line["step"] for line in measured], [line["eval_loss"] for line in measured]
        axes.plot(*points, color="tab:orange", marker="o", markersize=3.0, linewidth=1.2, label="held out")
        axes.legend(loc="upper right")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token")
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(steps, [line["learning_rate"] for line in lines], color="tab:gray", linewidth=1.0, linestyle="--")
    rate.set_ylabel("learning rate (dashed)")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_title(title)
    figure.savefig(path)


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """The mean of the values so far, over at most `window` of them; a tenth of the run when not given.

    >>> smooth([4.0, 2.0, 3.0], window=2)
    [4.0, 3.0, 2.5]
    """
    width = window or max(1, len(values) // 10)
    parts = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]
