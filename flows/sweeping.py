"""A sweep: trials one after the other, each an ordinary run of the recipe with other values.

One decision: a trial that fails by its own doing (a loss that is not finite, values that cannot be together, too little
memory) has failed for good, and the next one begins. What no trial can help, a full disk, a lost network or a kill,
ends the sweep with its trial open, and the same command goes on there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flows.graph import Pipeline, build
from flows.mlflow_tree import Nested
from flows.planning import PlannedStep
from flows.planning import plan as plan_steps
from flows.preflight import preflight
from flows.runner import run_flow
from flows.session import Session
from flows.sweep_plan import SweepPlan, Values
from flows.sweep_study import Study, Trial
from flows.view import View
from registry.errors import InputError
from registry.home import Home
from registry.sweeps import value_text
from tasks.artifacts import Store
from tasks.launch import RETRIED, ProgramFailed
from tasks.program import classify

NO_FAULT = RETRIED | {"disk_full"}
"""Kinds of failures that say nothing about a trial."""
SWEEP_TAG, TRIAL_TAG = "llamatuner.sweep", "llamatuner.trial"


@dataclass(frozen=True)
class Teller:
    """Who is told."""

    view: Callable[[], View]
    """Of the next trial."""
    say: Callable[[str], None]


def run_trials(
    plan: SweepPlan, study: Study, home: Home, teller: Teller, stop: threading.Event, parent: str | None
) -> str:
    """Do what is not done; `completed`, `cancelled`, or why the sweep cannot go on.

    Args:
        plan: of the sweep.
        study: its trials.
        home: where.
        teller: who is told.
        stop: set to end the sweep.
        parent: the sweep's run in MLflow.
    """
    while not stop.is_set():
        trial = study.next()
        if trial is None:
            return "completed"
        teller.say(f"\ntrial {trial.number} of {plan.count}: {values_text(trial.values)}")
        why = _do(plan, study, trial, home, teller, stop, parent)
        if why:
            return why
    return "cancelled"


def _do(
    plan: SweepPlan, study: Study, trial: Trial, home: Home, teller: Teller, stop: threading.Event, parent: str | None
) -> str | None:
    """One trial; why the sweep cannot go on, if it cannot."""
    began = time.monotonic()
    try:
        pipeline = _ready(plan, trial.values, home, teller)
    except InputError as error:
        study.fail(trial, {"error": str(error), "bad_input": True})
        teller.say(f"trial {trial.number} failed: {error}")
        return None
    params = {key: value_text(value) for key, value in trial.values.items()}
    tags = {SWEEP_TAG: plan.name, TRIAL_TAG: str(trial.number)}
    view = teller.view()
    try:
        session = Session(pipeline, home, view, stop, Nested(parent, f"trial {trial.number}", tags, params))
        status = run_flow(session, [f"sweep:{plan.name}", f"trial:{trial.number}"])
    finally:
        view.close()
    outcome = {
        "run": session.record.values["id"],
        "mlflow_run_id": session.tracker.root,
        "seconds": round(time.monotonic() - began, 3),
        "steps_made": sum(each.state == "ran" for each in session.outcomes.values()),
    }
    if status == "cancelled":
        return None  # it stays open
    if status == "failed":
        return _failed(study, trial, session, outcome, teller)
    found = session.results()[plan.target.label].get(plan.target.metric)
    if found is None or not math.isfinite(found["value"]):
        rule = f"{plan.target.metric} " + ("was not measured" if found is None else f"is {found['value']}")
        study.fail(trial, outcome | {"error": rule})
        teller.say(f"trial {trial.number} failed: {rule}")
        return None
    study.complete(trial, found["value"], outcome | {k: found[k] for k in ("low", "high", "rows") if k in found})
    shared = len(session.outcomes) - outcome["steps_made"]
    teller.say(f"trial {trial.number}: {plan.target.metric} {number_text(found)}; {shared} steps shared")
    return None


def _ready(plan: SweepPlan, values: Values, home: Home, teller: Teller) -> Pipeline:
    """The steps of a trial, if they can be done.

    Raises:
        InputError: they cannot.
    """
    pipeline = build(plan.trial(values), home)
    for note in preflight(pipeline, plan_of(pipeline, home), home):
        if note not in plan.notes:
            teller.say(note)
    return pipeline


def plan_of(pipeline: Pipeline, home: Home) -> list[PlannedStep]:
    """What each step of a trial would do now."""
    return plan_steps(pipeline, Store(home))


def _failed(study: Study, trial: Trial, session: Session, outcome: Mapping[str, Any], teller: Teller) -> str | None:
    """A trial that did not end well: for good, or it stays open and the sweep ends with why."""
    if session.timed_out:
        session.stop.clear()  # this trial's time is over, not the sweep's
    errors, text = session.errors(), str(session.error_text())
    if "prefect" in errors or any(_kind(error) in NO_FAULT for error in errors.values()):
        return f"trial {trial.number} cannot go on now: {text}"
    bad = bool(errors) and all(isinstance(error, InputError) for error in errors.values())
    study.fail(trial, {**outcome, "error": text, "bad_input": bad})
    teller.say("\n".join([f"trial {trial.number} failed: {text}", *session.failures()]))
    return None


def _kind(error: BaseException) -> str:
    return error.kind if isinstance(error, ProgramFailed) else classify(error)[0]


def values_text(values: Values) -> str:
    """The values of a trial in one line, each setting by its last word.

    >>> values_text({"stages.sft.learning_rate": 0.00031622, "stages.sft.lora_rank": 8})
    'learning_rate 0.0003162, lora_rank 8'
    """
    names = short_names(list(values))
    return ", ".join(f"{names[key]} {short_value(value)}" for key, value in values.items())


def short_names(keys: list[str]) -> dict[str, str]:
    """Setting → as few of its last words as tell it from the others.

    >>> list(short_names(["stages.sft.seed", "stages.dpo.seed", "evaluation.limit"]).values())
    ['sft.seed', 'dpo.seed', 'limit']
    """
    found = {}
    for key in keys:
        words = key.split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        found[key] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
    return found


def short_value(value: Any) -> str:
    """A value for a table."""
    return f"{value:.4g}" if isinstance(value, float) else value_text(value)


def number_text(found: Mapping[str, Any]) -> str:
    """A number and its 95 % interval."""
    text = f"{found['value']:.4g}"
    return f"{text} ({found['low']:.4g} to {found['high']:.4g})" if "low" in found else text
