"""What a sweep came to: its trials in order, the best one, and whether it is better by more than chance.

One decision: nothing is measured for it. The best trial is compared on the very rows it was ranked by, drawn in pairs,
with the next one and with the recipe as it is written, where that was run, by whomever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flows.comparison import difference
from flows.graph import Pipeline, build
from flows.sweep_plan import SweepPlan, without_gate
from flows.sweep_study import Study, Trial
from flows.sweeping import plan_of
from registry.errors import InputError
from registry.home import Home
from registry.recipe import build_recipe
from tasks.measurements import Number, numbers


@dataclass(frozen=True)
class Compared:
    """The best trial beside another one, or beside the recipe as it is written."""

    trial: int | None
    """None: the recipe, which is no trial."""
    as_written: bool
    """It has the values of the recipe."""
    value: float
    """The best one's number less the other's."""
    low: float
    high: float
    real: bool
    """0 is outside the 95 % interval."""


@dataclass(frozen=True)
class SweepResults:
    """All trials of a sweep, and what they say."""

    trials: list[Trial]
    best: Trial | None
    compared: list[Compared]
    importances: Mapping[str, float]


def sweep_results(plan: SweepPlan, study: Study, home: Home) -> SweepResults:
    """What the trials that are done came to."""
    ranked = study.ranked()
    compared = _compared(plan, ranked, home) if ranked else []
    return SweepResults(study.trials(), ranked[0] if ranked else None, compared, study.importances())


def _compared(plan: SweepPlan, ranked: list[Trial], home: Home) -> list[Compared]:
    best = _of_trial(plan, ranked[0], home)
    if best is None:
        return []
    written = _as_written(plan, home)
    others = list[tuple[int | None, Found]]()
    for trial in ranked[1:]:  # those with another value of what changes nothing came to the very same
        found = _of_trial(plan, trial, home)
        if found is not None and found.key != best.key:
            others.append((trial.number, found))
            break
    if written is not None and written.key not in [best.key, *(found.key for _, found in others)]:
        others.append((next((t.number for t in ranked[2:] if _same(plan, t, written, home)), None), written))
    rows = []
    for number, found in others:
        if found.number.rows == best.number.rows:
            as_written = written is not None and found.key == written.key
            rows.append(Compared(number, as_written, **difference(best.number, found.number)))
    return rows


@dataclass(frozen=True)
class Found:
    """A number that is there, and the key of the step that measured it."""

    key: str | None
    number: Number


def find_number(pipeline: Pipeline, plan: SweepPlan, home: Home) -> Found | None:
    """The sweep's number of a pipeline that is done, with its drawn values; None where it is not there (any more)."""
    made = {line.step.title: line for line in plan_of(pipeline, home)}
    for step in pipeline.measured[plan.target.label].steps:
        line = made[step.title]
        for number in numbers(line.artifact, step.runtime["set_names"]) if line.artifact else ():
            if f"{number.metric}.{number.set_name}" == plan.target.metric:
                return Found(line.key, number)
    return None


def _of_trial(plan: SweepPlan, trial: Trial, home: Home) -> Found | None:
    return find_number(build(plan.trial(trial.values), home), plan, home)


def _same(plan: SweepPlan, trial: Trial, other: Found, home: Home) -> bool:
    found = _of_trial(plan, trial, home)
    return found is not None and found.key == other.key


def _as_written(plan: SweepPlan, home: Home) -> Found | None:
    """Of the recipe without the sweep's values; None where it was not run, or is none without them."""
    try:
        pipeline = build(build_recipe(without_gate(plan.raw), plan.folder, plan.title), home)
    except InputError:  # what it lacks the parameters give
        return None
    return find_number(pipeline, plan, home) if plan.target.label in pipeline.measured else None


def as_json(plan: SweepPlan, results: SweepResults) -> dict[str, Any]:
    """The results as `sweep --json` gives them."""
    target = plan.target
    return {
        "sweep": plan.name,
        "metric": target.metric,
        "stage": target.label,
        "direction": target.direction,
        "trials": [trial_json(each) for each in results.trials],
        "best": trial_json(results.best) if results.best else None,
        "compared": [asdict(each) for each in results.compared],
        "importances": dict(results.importances),
    }


def trial_json(trial: Trial) -> dict[str, Any]:
    """A trial as `sweep --json` gives it."""
    known = {"trial": trial.number, "state": trial.state, "parameters": trial.values, "value": trial.value}
    return known | dict(trial.outcome)
