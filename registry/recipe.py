"""A recipe: what to train, or what to measure, as frozen records.

One decision: top-level settings are the defaults of every stage; a file without `stages` is a recipe of one stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from registry.benchmarks import Benchmark, find_benchmark
from registry.errors import InputError, Problem, did_you_mean, shown
from registry.evaluation_records import EvaluationSettings
from registry.evaluation_rules import generation_problems
from registry.gates import condition
from registry.old_configs import as_recipe, translate
from registry.recipe_paths import absolute_paths
from registry.records import RunSettings
from registry.stage_settings import NAME, READING, RECIPE_KEYS, StageSettings, collect, read_record, read_stage

COMPARED = ("base", "none")
ASKED = ("perplexity", "benchmarks", "generate", "questions")


@dataclass(frozen=True)
class Evaluated:
    """A model that is measured and not trained."""

    model: str
    """See `flows.named_models`."""
    settings: StageSettings
    """How rows are read for it."""
    given: frozenset[str]
    """Settings that the recipe has; the others are as the model's own stage has them, where one made it."""


@dataclass(frozen=True)
class Recipe:
    """A validated recipe."""

    name: str
    stages: tuple[StageSettings, ...]
    evaluation: EvaluationSettings
    raw: Mapping[str, Any]
    """As written, with overrides applied and paths made absolute: what is kept with the run."""
    notes: tuple[str, ...] = ()
    """What was read differently from how it was written, e.g. an alias."""
    benchmarks: tuple[Benchmark, ...] = ()
    """Those of `evaluation`, found."""
    evaluates: Evaluated | None = None
    """The model that is measured, of a recipe that trains nothing."""
    run: RunSettings = field(default_factory=RunSettings)


def build_recipe(raw: Any, folder: Path, title: str) -> Recipe:
    """Validate what a recipe file says.

    Args:
        raw: the parsed file, overrides applied.
        folder: where relative `dataset_dir`s start.
        title: the file, for the error.

    Raises:
        InputError: everything that is wrong, at once.
    """
    if not isinstance(raw, dict) or not raw:
        raise InputError(Problem("", "a recipe is a mapping of settings", "See `llamatuner list recipes`."), title)
    raw, notes, problems = as_recipe(absolute_paths(raw, folder))
    if "evaluate" in raw:
        return _evaluation_recipe(raw, title, notes, problems)
    defaults = {key: value for key, value in raw.items() if key not in RECIPE_KEYS}
    written = raw.get("stages", {str(defaults.get("stage", "sft")): {}})
    if not isinstance(written, dict) or not written:
        rule = f"{shown(written)} is not a mapping of stage names to settings"
        raise InputError(Problem("stages", rule, "E.g. stages: {sft: {stage: sft, dataset: rows.jsonl}}"), title)
    flat = [key for key, value in written.items() if not isinstance(value, dict)]
    if flat:
        rule, cure = "is not a mapping of settings", "E.g. {stage: sft, dataset: rows.jsonl}"
        raise InputError([Problem(f"stages.{key}", f"{shown(written[key])} {rule}", cure) for key in flat], title)
    name, run = _name(raw.get("name", Path(title).stem), problems), _run(raw, problems)
    evaluation, benchmarks = _evaluation(raw, problems)
    stages, unused = {}, list[dict[str, Problem]]()
    for stage_name, own in written.items():
        known = len(problems)
        where = _places(str(stage_name), own, defaults, "stages" in raw)
        found = translate(_inherited(defaults, own, written), where)
        notes += found.notes(where)
        problems += found.problems
        stage, without_effect = read_stage(str(stage_name), found.settings, where, evaluation, problems)
        own_keys = {where(key) for key in found.settings if found.origins.get(key, key) in own}
        problems += [problem for problem in without_effect if problem.where in own_keys]
        unused.append({problem.where: problem for problem in without_effect})
        if stage is not None and len(problems) == known:
            stages[str(stage_name)] = stage
    # a default that no stage can use
    problems += [problem for key, problem in unused[0].items() if all(key in others for others in unused)]
    ordered = in_order(stages, problems) if len(stages) == len(written) else []
    if problems:
        raise InputError(_each_once(problems), title)
    assert evaluation is not None
    assert run is not None
    return Recipe(name, tuple(ordered), evaluation, raw, tuple(dict.fromkeys(notes)), benchmarks, run=run)


def _evaluation(
    raw: Mapping[str, Any], problems: list[Problem]
) -> tuple[EvaluationSettings | None, tuple[Benchmark, ...]]:
    """What is measured, whether it can be together, and the benchmarks that are meant."""
    found: EvaluationSettings | None = read_record(
        EvaluationSettings, raw.get("evaluation", {}), lambda key: f"evaluation.{key}", problems
    )
    if found is not None and "evaluate" not in raw and found.compare_with not in COMPARED:
        rule = f"{found.compare_with!r} is not {' or '.join(COMPARED)}"
        problems.append(Problem("evaluation.compare_with", rule, "Another model is for recipes with `evaluate`."))
    if found is not None and "evaluate" in raw and found.gate:
        rule = "a gate decides on a model that the recipe trains, and this one trains none"
        problems.append(Problem("evaluation.gate", rule, "Use `llamatuner promote RUN --gate CONDITION`."))
    if found is not None:
        problems += generation_problems(found, lambda key: f"evaluation.{key}")
        if found.reward_model is not None and not found.generate:
            rule = "scores the answers that `generate` writes, and there is no data set to answer"
            problems.append(Problem("evaluation.reward_model", rule, "Set generate, or remove it."))
    for text in found.gate if found is not None else ():
        collect(problems, condition, text, "evaluation.gate")
    benchmarks: list[Benchmark] = []
    for wanted in found.benchmarks if found is not None else ():
        benchmark = collect(problems, find_benchmark, wanted, found, "evaluation.benchmarks")
        if benchmark is not None and benchmark.name in [each.name for each in benchmarks]:
            rule = f"{benchmark.name} stands there twice; each is reported by its name"
            problems.append(Problem("evaluation.benchmarks", rule, "Remove one of them."))
        benchmarks += [benchmark] if benchmark is not None else []
    return found, tuple(benchmarks)


def _evaluation_recipe(raw: Mapping[str, Any], title: str, notes: list[str], problems: list[Problem]) -> Recipe:
    """A recipe that measures a model and trains none.

    Args:
        raw: as it is kept.
        title: the file, for the error.
        notes, problems: of what was read so far.

    Raises:
        InputError: everything that is wrong, at once.
    """
    name, model = _name(raw.get("name", Path(title).stem), problems), raw["evaluate"]
    if not isinstance(model, str) or not model:
        problems.append(Problem("evaluate", f"{shown(model)} is no model", "Name one, as `llamatuner evaluate` does."))
    run = _run(raw, problems)
    evaluation, benchmarks = _evaluation(raw, problems)
    found = translate({key: value for key, value in raw.items() if key not in RECIPE_KEYS}, lambda key: key)
    notes, problems, settings = notes + found.notes(lambda key: key), problems + found.problems, found.settings
    for key in ("stages", *settings):
        if key in raw and key not in READING:
            rule = "has no effect: a recipe with `evaluate` trains nothing"
            problems.append(Problem(key, rule, did_you_mean(key, READING) or "Remove it."))
    kept = {key: value for key, value in settings.items() if key in READING} | {"model_name_or_path": str(model)}
    if evaluation is not None and not any(getattr(evaluation, asked) for asked in ASKED):
        rule = "there is nothing to measure"
        problems.append(Problem("evaluation", rule, f"Give it {', '.join(ASKED[:-1])} or {ASKED[-1]}."))
    stage, _ = read_stage("model", kept, lambda key: key, evaluation, problems, trains=False)
    if problems:
        raise InputError(_each_once(problems), title)
    assert evaluation is not None
    assert stage is not None
    assert run is not None
    evaluated = Evaluated(model, stage, frozenset(kept))
    return Recipe(name, (), evaluation, raw, tuple(dict.fromkeys(notes)), benchmarks, evaluated, run)


def _run(raw: Mapping[str, Any], problems: list[Problem]) -> RunSettings | None:
    written = {key: raw[key] for key in RunSettings.model_fields if key in raw}
    found: RunSettings | None = read_record(RunSettings, written, lambda key: key, problems)
    return found


def _inherited(defaults: Mapping[str, Any], own: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings; one that starts from another stage has that stage's base model."""
    settings = {**defaults, **own}
    seen: list[Any] = []
    while "model_name_or_path" not in settings and own.get("model") in written and own["model"] not in seen:
        seen.append(own["model"])
        own = written[own["model"]]
        settings |= {key: own[key] for key in ("model_name_or_path",) if key in own}
    return settings


def in_order(stages: Mapping[str, StageSettings], problems: list[Problem]) -> list[StageSettings]:
    """The stages, each behind those it refers to; in the order they are written where that leaves a choice."""
    needs: dict[str, set[str]] = {}
    for name, stage in stages.items():
        found = stage.references()
        if "model" in found and found["model"] not in stages:
            cure = did_you_mean(found["model"], [other for other in stages if other != name])
            problems.append(Problem(f"stages.{name}.model", f"{found['model']!r} is no stage of this recipe", cure))
        needs[name] = {value for value in found.values() if value in stages}
    try:
        return [stages[name] for name in TopologicalSorter(needs).static_order()] if not problems else []
    except CycleError as error:
        rule = f"the stages {' → '.join(error.args[1])} start from each other"
        problems.append(Problem("stages", rule, "One of them has to start from a base model."))
        return []


def _each_once(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def _name(value: Any, problems: list[Problem]) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        problems.append(
            Problem("name", f"{shown(value)} is not a name", "Letters, digits, dot, dash, underscore; at most 60.")
        )
        return "unnamed"
    return value


def _places(stage: str, own: Mapping[str, Any], defaults: Mapping[str, Any], nested: bool) -> Any:
    """Key → where it is written, or would be: in the stage, or at the top as a default."""
    return lambda key: f"stages.{stage}.{key}" if nested and (key in own or key not in defaults) else key
