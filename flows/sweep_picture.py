"""Pictures of a sweep: every trial as a line through its values, and how much each parameter matters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flows.sweep_plan import SweepPlan
from flows.sweep_study import Trial
from flows.sweeping import short_names, short_value
from registry.sweeps import Choices, Range, value_text
from tasks.measurements import MINIMIZE
from tasks.number_picture import COLOURS, as_png, new_figure

SCALE = "cividis"  # looks the same to people with any eyes; dark is good
BEST = COLOURS[1]
TICKS = 5
LONGEST = 14  # characters of a label


def draw_trials(plan: SweepPlan, trials: Sequence[Trial], best: Trial) -> bytes:
    """Parallel coordinates as a PNG: an axis for each parameter and the number; the best trial stands out.

    Args:
        plan: of the sweep.
        trials: all; those without a number are dashed, up to their last parameter.
        best: one of them.
    """
    space, names = plan.sweep.space, short_names(list(plan.sweep.space))
    done = [trial for trial in trials if trial.value is not None]
    low, high = (pick([trial.value for trial in done if trial.value is not None]) for pick in (min, max))
    count = len(space)
    figure = new_figure(max(6.0, 1.9 * (count + 1)), 4.2)
    axes = figure.subplots()
    for trial in sorted(trials, key=lambda each: (each.number == best.number, each.value is not None)):
        heights = [_height(space[key], trial.values[key]) for key in space if key in trial.values]
        style: dict[str, Any] = {"color": "#888888", "linewidth": 1.0, "linestyle": ":"}
        if trial.value is not None:
            share = _share(trial.value, low, high)
            heights.append(share)
            good = 1 - share if plan.target.direction == MINIMIZE else share
            style = {"color": _colour(good), "linewidth": 1.6, "alpha": 0.9}
        if trial.number == best.number:
            style = {"color": BEST, "linewidth": 3.2, "marker": "o", "markersize": 6}
        axes.plot(range(len(heights)), heights, **style)
    for place, key in enumerate(space):
        _axis(axes, place, _ticks(space[key]))
    _axis(axes, count, [(_share(v, low, high), f"{v:.4g}") for v in _between(low, high)])
    better = "less is better" if plan.target.direction == MINIMIZE else "more is better"
    axes.set_xticks(range(count + 1), [*names.values(), f"{plan.target.metric}\n{better}"])
    axes.set(xlim=(-0.15, count + 0.45), ylim=(-0.06, 1.06), yticks=[])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    failed = len(trials) - len(done)
    told = f"{len(done)} trials, darker is better; trial {best.number} is the best (thick)"
    axes.set_title(told + (f"; dotted: {failed} without a number" if failed else ""), fontsize=9, loc="left")
    return as_png(figure)


def _colour(good: float) -> Any:
    """Dark for 1."""
    import matplotlib

    return matplotlib.colormaps[SCALE](0.92 * (1 - good))


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _height(space: Choices | Range, value: Any) -> float:
    """Where a value stands on its axis, 0 to 1."""
    if isinstance(space, Choices):
        last = len(space.values) - 1
        return space.texts.index(value_text(value)) / last if last else 0.5
    if space.log:
        return _share(math.log(value), math.log(space.low), math.log(space.high))
    return _share(value, space.low, space.high)


def _ticks(space: Choices | Range) -> list[tuple[float, str]]:
    """Heights and labels of an axis."""
    if isinstance(space, Choices):
        values: Sequence[Any] = space.values
    elif space.log:
        ends = math.log(space.low), math.log(space.high)
        values = [math.exp(number) for number in _between(*ends)]
    else:
        values = _between(space.low, space.high)
    return [(_height(space, value), short_value(value)) for value in values]


def _between(low: float, high: float) -> list[float]:
    return [low + (high - low) * number / (TICKS - 1) for number in range(TICKS)] if high > low else [low]


def _axis(axes: Any, place: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(place, color="black", linewidth=0.8, zorder=0)
    for height, label in ticks:
        text = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"
        axes.plot([place - 0.012, place + 0.012], [height, height], color="black", linewidth=0.8)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
        axes.annotate(text, (place + 0.03, height), va="center", fontsize=8, bbox=box)


def draw_importances(importances: Mapping[str, float], count: int) -> bytes:
    """Bars as a PNG.

    Args:
        importances: of `flows.sweep_study.Study.importances`.
        count: of trials behind them.
    """
    names = short_names(list(importances))
    figure = new_figure(6.5, 1.0 + 0.42 * len(importances))
    axes = figure.subplots()
    ordered = sorted(importances.items(), key=lambda item: item[1])
    for place, (_, share) in enumerate(ordered):
        axes.barh(place, share, height=0.62, color=COLOURS[0])
        axes.annotate(f" {share:.0%}", (share, place), va="center", fontsize=9)
    axes.set_yticks(range(len(ordered)), [names[key] for key, _ in ordered])
    axes.set(xlim=(0, 1.08), xlabel="share in what tells good trials from bad ones (random forest)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Importance of parameters, estimated from {count} trials", fontsize=9, loc="left")
    return as_png(figure)
