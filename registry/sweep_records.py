"""What a sweep file says: which number is wanted, how trials are chosen, and which settings are varied."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from registry.record import Record, Steps, Text


class SweepSettings(Record):
    """A sweep over a recipe."""

    metric: Text
    """The number that is made better, named as in `results` of `run --json`, such as `perplexity.held_out`.
    Where several stages have it, `sft.perplexity.held_out`."""
    direction: Literal["minimize", "maximize"] | None = None
    """Which way is better; not needed for metrics of which it is known."""
    method: Literal["grid", "random", "tpe"]
    """How trials are chosen: every combination, at random, or by what earlier trials came to (`tpe`).
    They are Optuna's; the first 10 trials of `tpe` are drawn at random."""
    trials: Steps | None = None
    """Trials of `random` and `tpe`; a grid has as many as there are combinations."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of what `random` and `tpe` draw; a trial draws the same whether the sweep was interrupted or not."""
    parameters: Annotated[dict[str, Any], Field(min_length=1)]
    """Setting of the recipe, as for `--set` → a list of values, or a range."""


class RangeSettings(Record):
    """A range of numbers."""

    low: float
    """Least value."""
    high: float
    """Largest value."""
    log: bool = False
    """Draw evenly by the logarithm, as for a learning rate."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Distance of values; nothing means any number between, for a setting of whole numbers 1."""
