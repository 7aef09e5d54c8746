"""The trials of a sweep, kept by Optuna in a database of the sweep's own.

One decision: who dies leaves its trial running in the database, and whoever has the sweep's lock takes it up again
before it asks for another one. A trial draws from random numbers of its own, so that it is the same trial whatever was
interrupted before it. SQLite, because a line that a kill cuts in two makes Optuna's journal unreadable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from flows.sweep_plan import SweepPlan, Values
from registry.home import Home
from registry.sweeps import GRID, Choices, Range, value_text
from tasks.measurements import MINIMIZE

DATABASE = "study.db"
OUTCOME = "outcome"
FEWEST = 4  # trials of which importances are estimated
COMPLETE, FAILED, RUNNING = "complete", "failed", "running"
STATES = {"COMPLETE": COMPLETE, "FAIL": FAILED, "RUNNING": RUNNING, "WAITING": "waiting"}


@dataclass(frozen=True)
class Trial:
    """A trial, as far as it is."""

    number: int
    """From 1."""
    values: Values
    state: str
    """`complete`, `failed` or `running`, which is interrupted when nobody is at it."""
    value: float | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict)
    """Of a finished one: `seconds`, `run`, `mlflow_run_id`, and `low`, `high`, `rows` or `error`."""


def sweep_folder(home: Home, name: str) -> Path:
    """Where a sweep keeps what is its own."""
    return home.sweeps / name


class Study:
    """The trials of one sweep; its lock is held by whoever has one.

    Args:
        plan: what they are.
        folder: where the database is; None keeps nothing.
    """

    def __init__(self, plan: SweepPlan, folder: Path | None) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{folder / DATABASE}"
        self.plan = plan
        better: Any = plan.target.direction
        self._study: Any = optuna.create_study(
            storage=storage, study_name=plan.name, direction=better, load_if_exists=True
        )

    def trials(self) -> list[Trial]:
        """All that were begun, in their order."""
        return [self._read(trial) for trial in self._study.get_trials(deepcopy=False)]

    def _read(self, trial: Any) -> Trial:
        values = self._values(trial.params)
        state, outcome = STATES[trial.state.name], trial.user_attrs.get(OUTCOME, {})
        return Trial(trial.number + 1, values, state, trial.value if state == COMPLETE else None, outcome)

    def _values(self, params: Mapping[str, Any]) -> Values:
        """What a recipe is given for what Optuna has, which knows choices by their texts."""
        found = {}
        for key, space in self.plan.sweep.space.items():
            if key in params:
                given = params[key]
                found[key] = space.values[space.texts.index(given)] if isinstance(space, Choices) else given
        return found

    def next(self) -> Trial | None:
        """The trial that somebody died in, or else a new one; None when all are done."""
        import optuna

        known = self._study.get_trials(deepcopy=False)
        left = [trial for trial in known if trial.state.name == "RUNNING"]
        waiting = any(trial.state.name == "WAITING" for trial in known)
        if not left and not waiting and len(known) >= self.plan.count:
            return None
        number = left[0].number if left else len(known) - waiting
        self._study.sampler = self._sampler(number)
        if left:  # what it was given is kept; what it was not given before it died is drawn
            trial = optuna.Trial(self._study, left[0]._trial_id)
        else:
            if self.plan.sweep.settings.method == GRID and not waiting:
                self._study.enqueue_trial(self._params(self.plan.combinations[number]))
            trial = self._study.ask()
        for key, space in self.plan.sweep.space.items():
            _suggest(trial, key, space)
        return Trial(trial.number + 1, self._values(trial.params), RUNNING)

    def _params(self, values: Values) -> dict[str, Any]:
        """What Optuna has for the values of a recipe."""
        return {
            key: value_text(values[key]) if isinstance(space, Choices) else values[key]
            for key, space in self.plan.sweep.space.items()
        }

    def _sampler(self, number: int) -> Any:
        """What draws a trial; of a grid, where nothing is drawn, it is not asked."""
        from optuna.samplers import RandomSampler, TPESampler

        settings = self.plan.sweep.settings
        seed = int(numpy.random.SeedSequence(settings.seed, spawn_key=(number,)).generate_state(1)[0])
        return TPESampler(seed=seed) if settings.method == "tpe" else RandomSampler(seed=seed)

    def complete(self, trial: Trial, value: float, outcome: Mapping[str, Any]) -> None:
        """A trial came to something."""
        self._tell(trial, "COMPLETE", value, outcome)

    def fail(self, trial: Trial, outcome: Mapping[str, Any]) -> None:
        """A trial came to nothing."""
        self._tell(trial, "FAIL", None, outcome)

    def _tell(self, trial: Trial, state: str, value: float | None, outcome: Mapping[str, Any]) -> None:
        from optuna.trial import TrialState

        number = trial.number - 1
        found = self._study.get_trials(deepcopy=False)[number]
        self._study._storage.set_trial_user_attr(found._trial_id, OUTCOME, dict(outcome))
        self._study.tell(number, value, TrialState[state])

    def keep(self, **values: str | None) -> None:
        """Remember something of the sweep."""
        for name, value in values.items():
            self._study.set_user_attr(name, value)

    def kept(self, name: str) -> Any:
        """What was remembered; None: nothing."""
        return self._study.user_attrs.get(name)

    def ranked(self) -> list[Trial]:
        """Complete trials, the best one first; of equal ones the earlier one."""
        sign = 1 if self.plan.target.direction == MINIMIZE else -1
        done = [trial for trial in self.trials() if trial.value is not None]
        return sorted(done, key=lambda trial: sign * (trial.value or 0.0))

    def importances(self) -> dict[str, float]:
        """Parameter → its share in what tells good trials from bad ones, 1 together; the largest first. Nothing where
        trials are few, do not differ, or have one parameter.

        By how much the splits of a random forest make the number vary less (mean decrease of impurity), because that
        needed fewer trials than the others: from 18 of a made-up function that varies by the learning rate but for 3 %,
        it gave it 90 %, fANOVA 24 %, and PED-ANOVA, Optuna's default, 58 %.
        """
        values = [trial.value for trial in self.trials() if trial.value is not None]
        parameters = len(self.plan.sweep.space)
        if len(values) < max(FEWEST, 2 * parameters) or len(set(values)) < 2 or parameters < 2:
            return {}
        from optuna.importance import MeanDecreaseImpurityImportanceEvaluator, get_param_importances

        found = get_param_importances(self._study, evaluator=MeanDecreaseImpurityImportanceEvaluator(seed=0))
        return {name: float(share) for name, share in found.items()}


def _suggest(trial: Any, key: str, space: Choices | Range) -> None:
    """Give a trial a value of a parameter, unless it has one."""
    if isinstance(space, Choices):
        trial.suggest_categorical(key, space.texts)
    elif space.whole:
        trial.suggest_int(key, int(space.low), int(space.high), step=int(space.step or 1), log=space.log)
    else:
        trial.suggest_float(key, space.low, space.high, step=space.step, log=space.log)
