"""The picture of a reward model: how often it is right by the lengths of the answers, and how sure it is of that."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from tasks.rewards import CHOSEN_LONGER, CHOSEN_SHORTER, SIMILAR

ROWS = {
    "": "all pairs",
    f"_{CHOSEN_SHORTER}": "preferred answer\nis shorter",
    f"_{SIMILAR}": "about the\nsame length",
    f"_{CHOSEN_LONGER}": "preferred answer\nis longer",
}
COUNTS_HEIGHT = 0.16  # of the fullest bin, at the bottom of the right half


def draw_rewards(results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A PNG: accuracy by length beside what the longer answer's rule reaches, and the share right by predicted one.

    Args:
        results: of one data set, as `tasks.rewards.reward_results` gives them.
    """
    # here, and without pyplot: it takes half a second, and no window system is looked for
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.9), facecolor="white")
    figure.subplots_adjust(0.14, 0.13, 0.98, 0.88, wspace=0.2)  # fixed: to measure every text takes as long as to draw
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_accuracy(left, results)
    _draw_calibration(right, results["reward_calibration_error"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def interval(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share, which is wide where there are few pairs.

    >>> [round(end, 3) for end in interval(8, 10)]
    [0.49, 0.943]

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = 1.96
    share, scale = right / rows, 1 + z * z / rows
    middle = (share + z * z / (2 * rows)) / scale
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def _draw_accuracy(axes: Any, results: Mapping[str, Mapping[str, Any]]) -> None:
    """A bar for all pairs and for those of each length; the line is what length alone reaches."""
    baseline = 100 * results["longer_is_better_accuracy"]["value"]
    axes.axvline(baseline, color="tab:red", linestyle="--", linewidth=1.2, zorder=3)
    axes.annotate(
        f"  “the longer is better”: {baseline:.1f} %  ",
        (baseline, -0.62),
        ha="right" if baseline > 50 else "left",
        va="center",
        color="tab:red",
        fontsize=8,
        annotation_clip=False,
    )
    for place, ending in enumerate(ROWS):
        found = results.get(f"reward_accuracy{ending}")
        if found is None:
            axes.annotate("no pairs", (2, place), va="center", fontsize=8, color="gray")
            continue
        share = 100 * found["value"]
        axes.barh(place, share, height=0.62, color="tab:blue", alpha=0.45 if ending else 0.85)
        ends = [100 * end for end in interval(found["right"], found["rows"])]
        axes.plot(ends, [place + 0.2, place + 0.2], color="black", linewidth=1)  # below the words
        axes.annotate(f"{share:.1f} % of {found['rows']:,}", (2, place - 0.04), va="center", fontsize=8)
    axes.set_yticks(range(len(ROWS)), list(ROWS.values()), fontsize=8)
    axes.set(xlim=(0, 100), xlabel="pairs right, %", ylim=(len(ROWS) - 0.5, -0.9), title="Right by length")


def _draw_calibration(axes: Any, found: Mapping[str, Any]) -> None:
    """The share right of each bin over its predicted probability; calibrated models are on the line."""
    axes.plot([0.5, 1], [0.5, 1], color="gray", linestyle=":", linewidth=1.2)
    most = max(each["rows"] for each in found["bins"])
    for each in found["bins"]:
        place, height = (each["from"] + each["to"]) / 2, COUNTS_HEIGHT * each["rows"] / most
        axes.bar(place, height, width=0.045, color="tab:gray", alpha=0.4)
        axes.annotate(f"{each['rows']:,}", (place, height + 0.01), ha="center", fontsize=7, color="dimgray")
        predicted = each["predicted"]
        axes.plot([predicted, predicted], interval(each["right"], each["rows"]), color="tab:blue", linewidth=1)
        axes.plot(predicted, each["right"] / each["rows"], marker="o", color="tab:blue", markersize=5)
    axes.set(xlim=(0.49, 1.01), ylim=(0, 1.04), xlabel="predicted: σ(|difference of the two scores|)")
    axes.set(ylabel="share right; pairs in gray", title=f"Calibration: mean error {found['value']:.3f}")
    axes.grid(alpha=0.25)
