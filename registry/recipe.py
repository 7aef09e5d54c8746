"""A recipe: what to train, as frozen records.

One decision: a stage is written flat, with the argument names people know, and is split here into records by field
name. Top-level settings are the defaults of every stage; a file without `stages` is a recipe of one stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from registry.combinations import idle, refused
from registry.core import user_path
from registry.data_registry import find_dataset
from registry.data_sources import DataSource
from registry.deepspeed import deepspeed_config, zero_stage
from registry.errors import InputError, Problem, did_you_mean, shown
from registry.evaluation_records import EvaluationSettings
from registry.gates import condition
from registry.optimizers import OPTIMIZERS
from registry.recipe_paths import absolute_paths
from registry.records import (
    DataSettings,
    InlineDataset,
    ModelSettings,
    Record,
    RuntimeSettings,
    TrainSettings,
)
from registry.reward_rules import reward_problems
from registry.stages import METHODS, STAGES
from registry.templates import template_text

RECORDS: tuple[type[Record], ...] = (ModelSettings, DataSettings, TrainSettings, RuntimeSettings)
FIELDS: dict[str, type[Record]] = {name: record for record in RECORDS for name in record.model_fields}
RECIPE_KEYS = ("name", "stages", "evaluation")
ALIASES = {
    "eval_dataset_size": "val_size",
    "model_max_length": "cutoff_len",
    **dict.fromkeys(("dpo_beta", "kto_beta", "orpo_beta"), "pref_beta"),
    **dict.fromkeys(("dpo_ftx", "kto_ftx"), "pref_ftx"),
    "dpo_loss": "pref_loss",
    "quantization_bit": "quant_bit",
    "quantization_type": "quant_type",
    "double_quant": "double_quantization",
    "max_completion_length": "max_new_tokens",
    "num_iterations": "ppo_epochs",
}
EXPORT_OPTIONS = {"export_dir": "--to", "export_size": "--max-shard-size", "export_hub_model_id": "--push-to-hub"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


@dataclass(frozen=True)
class StageSettings:
    """One stage of a recipe."""

    name: str
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    runtime: RuntimeSettings
    sources: tuple[DataSource, ...]
    """The training data sets, found."""
    eval_sources: tuple[DataSource, ...]
    """Held-out data sets of the stage, with rows as it is trained on."""
    perplexity_sources: tuple[DataSource, ...]
    """Those of `evaluation.perplexity` that are not among them; conversations, or text for a stage of text."""
    template: str | None
    """Jinja text of the chat template; None: the model's own."""

    def references(self) -> dict[str, str]:
        """`model`, `ref_model` and `reward_model` where they name something, a stage or, but for `model`, any model."""
        train = self.train
        named = {"model": self.model.model, "ref_model": train.ref_model, "reward_model": train.reward_model}
        return {key: value for key, value in named.items() if value is not None}


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
    raw = absolute_paths(raw, folder)
    problems: list[Problem] = []
    notes: list[str] = []
    defaults = {key: value for key, value in raw.items() if key not in RECIPE_KEYS}
    written = raw.get("stages", {str(defaults.get("stage", "sft")): {}})
    if not isinstance(written, dict) or not written:
        rule = f"{shown(written)} is not a mapping of stage names to settings"
        raise InputError(Problem("stages", rule, "E.g. stages: {sft: {stage: sft, dataset: rows.jsonl}}"), title)
    flat = [key for key, value in written.items() if not isinstance(value, dict)]
    if flat:
        rule, cure = "is not a mapping of settings", "E.g. {stage: sft, dataset: rows.jsonl}"
        raise InputError([Problem(f"stages.{key}", f"{shown(written[key])} {rule}", cure) for key in flat], title)
    name = _name(raw.get("name", Path(title).stem), problems)
    evaluation = _record(EvaluationSettings, raw.get("evaluation", {}), lambda key: f"evaluation.{key}", problems)
    for text in evaluation.gate if evaluation is not None else ():
        _collect(problems, condition, text, "evaluation.gate")
    stages, unused = {}, list[dict[str, Problem]]()
    for stage_name, own in written.items():
        known = len(problems)
        where = _places(str(stage_name), own, defaults, "stages" in raw)
        settings = _renamed(_inherited(defaults, own, written), where, notes)
        stage, without_effect = _stage(str(stage_name), settings, where, evaluation, problems)
        own_keys = {where(ALIASES.get(key, key)) for key in own}
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
    return Recipe(name, tuple(ordered), evaluation, raw, tuple(dict.fromkeys(notes)))


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


def _renamed(settings: dict[str, Any], where: Any, notes: list[str]) -> dict[str, Any]:
    renamed = {}
    for key, value in settings.items():
        if key in ALIASES:
            notes.append(f"{where(key)} is read as {ALIASES[key]}")
        renamed[ALIASES.get(key, key)] = value
    return renamed


def _cure(key: str) -> str:
    """What to write instead of an unknown key."""
    if key.startswith("export_"):  # a recipe says what to train
        option = f", {EXPORT_OPTIONS[key]} there" if key in EXPORT_OPTIONS else ""
        return f"Models are written by `llamatuner export`{option}."
    return did_you_mean(key, [*FIELDS, *RECIPE_KEYS])


def _stage(
    name: str, settings: dict[str, Any], where: Any, evaluation: EvaluationSettings | None, problems: list[Problem]
) -> tuple[StageSettings | None, list[Problem]]:
    """A stage, where it is valid; and what is written in it, or above it, without effect."""
    for key in settings:
        if key not in FIELDS:
            problems.append(Problem(where(key), "unknown key", _cure(str(key))))
    if not NAME.fullmatch(name):
        problems.append(Problem(f"stages.{name}", "not a stage name", "Letters, digits, dot, dash, underscore."))
    stage = settings.get("stage", "sft")
    if isinstance(stage, str) and stage in STAGES:
        settings = dict(STAGES[stage].defaults) | settings
    parts = [
        _record(record, {k: v for k, v in settings.items() if FIELDS.get(k) is record}, where, problems)
        for record in RECORDS
    ]
    model, data, train, runtime = parts
    dataset_dir = settings.get("dataset_dir") or None
    directory = (
        _collect(problems, user_path, dataset_dir, where("dataset_dir")) if isinstance(dataset_dir, str) else None
    )
    for key in ("model_name_or_path", "adapter_name_or_path", "resume_from_checkpoint"):
        if isinstance(settings.get(key), str):
            _collect(problems, user_path, settings[key], where(key))
    sources = _sources(data.dataset, directory, where("dataset"), problems) if isinstance(data, DataSettings) else ()
    own: tuple[DataSource, ...] = ()
    general: tuple[DataSource, ...] = ()
    if isinstance(data, DataSettings):
        own = _unique(_sources(data.eval_dataset, directory, where("eval_dataset"), problems))
    if evaluation is not None:
        general = _unique(_sources(evaluation.perplexity, directory, "evaluation.perplexity", problems))
    template = (
        _collect(problems, template_text, data.template, where("template")) if isinstance(data, DataSettings) else None
    )
    without_effect = _rules(settings, parts, where, problems)
    if isinstance(data, DataSettings):
        known = isinstance(train, TrainSettings) and train.stage in STAGES
        _data_rules(data, STAGES[train.stage].shape if known else "chat", sources, where, problems)
    if not (
        isinstance(model, ModelSettings)
        and isinstance(data, DataSettings)
        and isinstance(train, TrainSettings)
        and isinstance(runtime, RuntimeSettings)
    ):
        return None, without_effect
    for source in (*own, *general):
        if any(other.name == source.name and other != source for other in (*own, *general)):
            rule = f"two held-out data sets are named {source.name!r}; each is reported by its name"
            problems.append(Problem(where("eval_dataset"), rule, "Rename one of the files."))
    general = tuple(source for source in general if source not in own)
    return StageSettings(name, model, data, train, runtime, tuple(sources), own, general, template), without_effect


def _unique(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    return tuple(source for number, source in enumerate(sources) if source not in sources[:number])


def _rules(
    settings: Mapping[str, Any], parts: list[Record | None], where: Any, problems: list[Problem]
) -> list[Problem]:
    """Names that must be known, and settings that exclude each other; those without effect are returned."""
    for key, registry in (("stage", STAGES), ("finetuning_type", METHODS), ("optim", OPTIMIZERS)):
        if isinstance(settings.get(key), str):
            _collect(problems, registry.lookup, settings[key], where(key))
    kept_back = settings.get("val_size")
    if isinstance(kept_back, float) and kept_back > 1 and not kept_back.is_integer():
        rule = f"{kept_back} is neither a share below 1 nor a whole number of rows"
        problems.append(Problem(where("val_size"), rule, "E.g. 0.1 or 100."))
    written = {key for key, value in settings.items() if value is not None}
    if all(parts):
        values = {key: value for part in parts if part for key, value in part}
        wanted = values["deepspeed"]
        config = _collect(problems, deepspeed_config, wanted, where("deepspeed")) if wanted else None
        values["zero_stage"] = zero_stage(config) if config is not None else None
        for part in parts:
            values |= part.resolved() if isinstance(part, TrainSettings) else {}
            problems += reward_problems(part, where) if isinstance(part, TrainSettings) else []
        problems += [Problem(where(key), rule, cure) for key, rule, cure in refused(values)]
        return [Problem(where(key), rule, cure) for key, rule, cure in idle(values, written)]
    return []


def _data_rules(
    data: DataSettings, shape: str, sources: tuple[DataSource, ...], where: Any, problems: list[Problem]
) -> None:
    """Choices about data that exclude each other, or do not fit the stage."""
    probs, given = data.interleave_probs, any(source.weight != 1.0 for source in sources)
    if data.mix_strategy == "concat" and (probs or given):
        rule = f"{'interleave_probs' if probs else 'weight'} has no effect with mix_strategy concat"
        key = "interleave_probs" if probs else "dataset"
        problems.append(Problem(where(key), rule, "Set mix_strategy: interleave_under or interleave_over."))
    elif probs and given:
        rule = "interleave_probs and weight both say the shares"
        problems.append(Problem(where("interleave_probs"), rule, "Remove one of them."))
    if probs and len(probs) != len(data.dataset):
        rule = f"{len(probs)} shares for {len(data.dataset)} data sets"
        problems.append(Problem(where("interleave_probs"), rule, "One for each, in their order."))
    if data.overlong == "split" and shape != "text":
        rule = "overlong split cuts plain text into blocks; conversations cannot be split"
        problems.append(Problem(where("overlong"), rule, "Use drop or truncate."))
    if data.train_on_prompt and data.mask_history:
        rule = "train_on_prompt trains everything, mask_history the last answer only"
        problems.append(Problem(where("train_on_prompt"), rule, "Choose one."))


def _sources(
    wanted: tuple[str | InlineDataset, ...], directory: Path | None, where: str, problems: list[Problem]
) -> tuple[DataSource, ...]:
    found = []
    for index, item in enumerate(wanted):
        if isinstance(item, InlineDataset):
            values = item.model_dump(exclude_none=True)
            found.append(_collect(problems, find_dataset, values, directory, f"{where}[{index}]"))
        else:
            found.append(_collect(problems, find_dataset, item, directory, where))
    return tuple(source for source in found if source is not None)


def _collect(problems: list[Problem], function: Any, *arguments: Any) -> Any:
    """Call, and keep the problems instead of stopping at the first."""
    try:
        return function(*arguments)
    except InputError as error:
        problems.extend(error.problems)
        return None


def _record(record: type[Record], values: Any, where: Any, problems: list[Problem]) -> Any:
    """A record from parsed values, typed strictly; None and problems when it is not valid."""
    unreadable = [key for key, value in values.items() if not _plain(value)] if isinstance(values, dict) else []
    if unreadable:
        rule = "only text, numbers, true/false, null, lists and mappings can be used"
        problems.extend(Problem(where(key), f"{shown(values[key])}: {rule}", "Quote it.") for key in unreadable)
        values = {key: value for key, value in values.items() if key not in unreadable}
    try:
        found = record.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        wrong = [item for item in error.errors(include_url=False) if item["loc"][:1] not in [(k,) for k in unreadable]]
        problems.extend(_problem(record, item, where) for item in wrong)
        return None
    return None if unreadable else found


def _plain(value: Any) -> bool:
    """Whether a value is one of JSON's, and its text can be written in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError):  # a date, bytes, a set; half of a surrogate pair
        return False
    return True


def _problem(record: type[Record], item: Any, where: Any) -> Problem:
    """One of pydantic's errors in our words: value, rule, and the unit line of the field as the cure."""
    loc = item["loc"]
    field = str(loc[0]) if loc else ""
    place = where(field) if field else where("").rstrip(".")
    if loc[2:3] == ("mapping",):  # inside a mapping in a list of data sets
        record, place, field = InlineDataset, f"{place}[{loc[1]}]", str(loc[3]) if len(loc) > 3 else ""
        place = ".".join([place, *map(str, loc[3:])])
    if item["type"] == "extra_forbidden":
        return Problem(place, "unknown key", did_you_mean(field, list(record.model_fields)))
    help_text = (record.model_fields[field].description or "").split("\n")[0] if field in record.model_fields else ""
    if item["type"] == "missing":
        return Problem(place, "missing, and it has no default", help_text)
    rule = item["msg"].replace("Input should be", "should be")
    if item["type"] == "too_short":  # in pydantic's words a tuple, which nobody wrote
        rule = "is empty"
    return Problem(place, f"{shown(item['input'])} {rule}", f"{field}: {help_text}" if help_text else "")
