"""Scores and KL over the steps, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.train.curve import new_figure, smooth


def draw_scores(lines: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draw the mean score (left) and the KL of an answer to the reference (right) of each step.

    Args:
        lines: `step`, `score`, `score_std` and `kl` of every step.
        path: the PNG to write.
        title: shown above the curves.
    """
    figure, axes = new_figure()
    steps, scores = [line["step"] for line in lines], [line["score"] for line in lines]
    low, high = ([line["score"] + sign * line["score_std"] for line in lines] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color="tab:blue", alpha=0.12, linewidth=0)
    axes.plot(steps, scores, color="tab:blue", alpha=0.35, linewidth=1.0, marker="." if len(steps) < 30 else None)
    axes.plot(steps, smooth(scores), color="tab:blue", linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("mean score (shaded: one standard deviation)")
    axes.grid(alpha=0.25)
    other = axes.twinx()
    other.plot(steps, [line["kl"] for line in lines], color="tab:orange", linewidth=1.2, linestyle="--")
    other.set_ylabel("KL to the reference, nats (dashed)")
    other.set_ylim(bottom=min(0.0, *(line["kl"] for line in lines)))
    axes.set_title(title)
    figure.savefig(path)
