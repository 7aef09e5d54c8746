"""What a sweep will do: its trials as recipes, the number they are ranked by, and what they share. Nothing runs here.

One decision: the name of a sweep is made of the content of all that its trials are made of, as the keys of steps are.
So the same command goes on with the same trials from anywhere, and when a row of the data changes, what the old rows
came to is not taken for what the new ones would.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.graph import Pipeline, build
from flows.measuring import ANY, known_metrics
from flows.planning import PlannedStep, plan
from flows.preflight import preflight, require_rows
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.loading import put, read_recipe
from registry.recipe import Recipe, build_recipe
from registry.sweeps import GRID, Sweep
from tasks.artifacts import Store
from tasks.digests import DigestMemory
from tasks.fingerprint import fingerprint
from tasks.measurements import direction
from tasks.steps import Step, input_digest

CHECKED = 500  # combinations of a grid that are all read as recipes first, 2 to 5 ms each; of more, value by value
Values = dict[str, Any]
"""Setting → its value in a trial."""


@dataclass(frozen=True)
class Target:
    """The number that trials are ranked by."""

    label: str
    """Who is measured, see `Pipeline.measured`."""
    metric: str
    """`<metric>.<set>`."""
    direction: str
    """`minimize` or `maximize`."""


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that fits its recipe."""

    name: str
    """Recipe and digest; of the study as well."""
    sweep: Sweep
    target: Target
    recipe: Recipe
    """The first trial's, with the gate, which no trial decides."""
    raw: Mapping[str, Any]
    """The recipe as written, overrides applied."""
    folder: Path
    """Where its relative paths start."""
    title: str
    notes: tuple[str, ...]
    """What will work and not as one would like."""

    @property
    def combinations(self) -> tuple[Values, ...]:
        """Of a grid, in the order in which they are tried: the last parameter changes first."""
        values = [space.grid() or () for space in self.sweep.space.values()]
        return tuple(dict(zip(self.sweep.space, row, strict=True)) for row in itertools.product(*values))

    @property
    def count(self) -> int:
        """Trials."""
        settings = self.sweep.settings
        return len(self.combinations) if settings.method == GRID else settings.trials or 0

    def trial(self, values: Values) -> Recipe:
        """The recipe of a trial.

        Raises:
            InputError: the values cannot be together.
        """
        return build_recipe(without_gate(with_values(self.raw, values)), self.folder, self.title)


def with_values(raw: Any, values: Values) -> Any:
    """A recipe as written with other values.

    Raises:
        InputError: a setting is nowhere in it.
    """
    for key, value in values.items():
        raw = put(raw, key, value, f"parameters.{key}")
    return raw


def without_gate(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe of which no run is made the champion."""
    evaluation = raw.get("evaluation")
    if not isinstance(evaluation, dict):
        return raw
    return {**raw, "evaluation": {key: value for key, value in evaluation.items() if key != "gate"}}


def plan_sweep(recipe: str, overrides: Sequence[str], sweep: Sweep, home: Home, title: str) -> SweepPlan:
    """Check a sweep against its recipe, data and this machine.

    Args:
        recipe: name or file.
        overrides: of its settings.
        sweep: read.
        home: where models and artifacts are.
        title: the sweep's file, for the error.

    Raises:
        InputError: everything that is wrong with any value of a parameter, at once.
    """
    raw, folder, recipe_title = read_recipe(recipe, overrides)
    problems = [
        Problem(f"--set {text}", "is a parameter of the sweep", "Remove one of them.")
        for text in overrides
        if text.partition("=")[0].strip() in sweep.space
    ]
    recipes: list[Recipe] = []
    singles = list(one_by_one(sweep))
    for number, values in enumerate([*singles, *_combined(sweep)]):
        try:
            found = build_recipe(with_values(raw, values), folder, recipe_title)
            recipes += [found] if number < len(singles) else []
        except InputError as error:
            problems += error.problems
    _require(problems, title, recipe_title)
    pipelines: list[Pipeline] = []
    for each in recipes:
        try:
            pipelines.append(build(each, home))
        except InputError as error:
            problems += error.problems
    target = _target(sweep, pipelines, problems)
    _require(problems, title, recipe_title)
    assert target is not None
    notes = _preflights(pipelines, home)
    name = f"{recipes[0].name}-{_digest(sweep, target, pipelines, home)[:12]}"
    return SweepPlan(name, sweep, target, recipes[0], raw, folder, recipe_title, notes)


def _require(problems: Sequence[Problem], title: str, recipe: str) -> None:
    if problems:
        raise InputError(list(dict.fromkeys(problems)), f"sweep {title} over {recipe}")


def one_by_one(sweep: Sweep) -> Iterator[Values]:
    """Every value that has to be good, each beside the first values of the others; the first of all first."""
    first = {key: space.corners()[0] for key, space in sweep.space.items()}
    yield first
    for key, space in sweep.space.items():
        for value in space.corners()[1:]:
            yield first | {key: value}


def _combined(sweep: Sweep) -> Iterator[Values]:
    """Combinations of those values, as far as they are few."""
    corners = [space.corners() for space in sweep.space.values()]
    if sweep.settings.method == GRID:
        corners = [space.grid() or () for space in sweep.space.values()]
    product = itertools.islice(itertools.product(*corners), CHECKED + 1)
    rows = [dict(zip(sweep.space, row, strict=True)) for row in product]
    return iter(rows if len(rows) <= CHECKED else [])


def _target(sweep: Sweep, pipelines: Sequence[Pipeline], problems: list[Problem]) -> Target | None:
    """The number that is meant, which every pipeline measures."""
    targets: list[Target] = []
    for pipeline in pipelines:
        try:
            targets.append(find_target(pipeline, sweep.settings.metric, sweep.settings.direction))
        except InputError as error:
            problems += error.problems
    if len(set(targets)) > 1:
        rule = f"{sweep.settings.metric!r} is not of the same model in all trials"
        problems.append(Problem("metric", rule, "Write the stage in front: sft.perplexity.held_out."))
    return targets[0] if targets else None


def find_target(pipeline: Pipeline, asked: str, wanted: str | None) -> Target:
    """The number of a name.

    Args:
        pipeline: that measures it.
        asked: `<metric>.<set>`, with or without `<stage>.` in front.
        wanted: which way is better; None where the metric says it.

    Raises:
        InputError: nothing measures it, several stages do, or which way is better is not known.
    """
    befores = pipeline.befores()
    known = {label: known_metrics(each.steps) for label, each in pipeline.measured.items() if label not in befores}

    def has(label: str, metric: str) -> bool:
        return metric in known[label] or f"{ANY}.{metric.partition('.')[2]}" in known[label]

    found = [(label, asked) for label in known if has(label, asked)]
    for label in known:
        rest = asked.removeprefix(f"{label}.")
        found = [(label, rest)] if rest != asked and has(label, rest) else found
    every = [(label, metric) for label, metrics in known.items() for metric in metrics]
    names = [f"{label}.{metric}" if len(known) > 1 else metric for label, metric in every]
    if not found:
        cure = did_you_mean(asked, names) if names else "Set val_size, eval_dataset or evaluation in the recipe."
        raise InputError(Problem("metric", f"no evaluation of this recipe makes {asked!r}", cure))
    if len(found) > 1:
        stages = " and ".join(label for label, _ in found)
        cure = f"Write {' or '.join(f'{label}.{metric}' for label, metric in found)}."
        raise InputError(Problem("metric", f"{asked!r} is measured of {stages}", cure))
    label, metric = found[0]
    better = wanted or direction(metric.partition(".")[0])
    if better is None:
        rule = f"missing, and it is not known which way {metric} is better"
        raise InputError(Problem("direction", rule, "Write minimize or maximize."))
    return Target(label, metric, better)


def _preflights(pipelines: Sequence[Pipeline], home: Home) -> tuple[str, ...]:
    """Refuse what cannot end, and read the rows that will be fetched, each file once; what was noticed."""
    notes: dict[str, None] = {}
    fetched: dict[str, PlannedStep] = {}
    for pipeline in pipelines:
        lines = plan(pipeline, Store(home))
        notes |= dict.fromkeys(preflight(pipeline, lines, home))
        fetched |= {str(line.key): line for line in lines if line.step.kind == "fetch"}
    require_rows(list(fetched.values()))
    return tuple(notes)


def _digest(sweep: Sweep, target: Target, pipelines: Sequence[Pipeline], home: Home) -> str:
    """Of the sweep, and of all that trials are made of; what changes no result, what things are called, and how many
    trials are wanted, is not in it."""
    contents, known = Contents(home), list[str]()
    for pipeline in pipelines:
        known += [contents.digest(step) for step in pipeline.steps]
    written = sweep.settings.model_dump(mode="json", exclude={"metric", "direction", "trials"})
    return fingerprint({"sweep": written, "target": [target.label, target.metric, target.direction], "steps": known})


class Contents:
    """What steps are, whether they are done or not: settings and the content of the folders behind them.

    Args:
        home: where digests of files are remembered.
    """

    def __init__(self, home: Home) -> None:
        self._store, self._memory, self._known = Store(home), DigestMemory(home.digests), dict[int, str]()

    def digest(self, step: Step) -> str:
        """Equal for steps that make the same."""
        if id(step) not in self._known:
            inputs = {}
            for name, wanted in step.inputs.items():
                behind = wanted.source
                made = self.digest(behind) if isinstance(behind, Step) else self._content(wanted)
                inputs[name] = [made, list(wanted.part)]
            self._known[id(step)] = fingerprint([step.kind, step.version, step.identity, inputs])
        return self._known[id(step)]

    def _content(self, wanted: Any) -> str:
        return str(input_digest(wanted, self._store, self._memory))


def shared(pipelines: Sequence[Pipeline], home: Home) -> dict[str, int]:
    """Step → how many different ones of it trials have; those of one are made once for all."""
    contents = Contents(home)
    steps = {(step.title, contents.digest(step)) for pipeline in pipelines for step in pipeline.steps}
    counts = Counter(title for title, _ in steps)
    return {step.title: counts[step.title] for pipeline in pipelines for step in pipeline.steps}
