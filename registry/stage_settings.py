"""A stage of a recipe, from what is written to frozen records.

One decision: a stage is written flat, with the argument names people know, and is split here into records by field
name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from registry.cluster_records import KubernetesSettings, slurm_problems
from registry.combinations import idle, refused
from registry.core import user_path
from registry.data_registry import find_dataset
from registry.data_sources import DataSource
from registry.deepspeed import deepspeed_config, zero_only, zero_stage
from registry.errors import InputError, Problem, did_you_mean, shown
from registry.evaluation_records import EvaluationSettings
from registry.optimizers import OPTIMIZERS
from registry.records import (
    DataSettings,
    InlineDataset,
    ModelSettings,
    Record,
    RunSettings,
    RuntimeSettings,
    TrainSettings,
)
from registry.reward_rules import reward_problems
from registry.stages import METHODS, STAGES
from registry.templates import template_text

RECORDS: tuple[type[Record], ...] = (ModelSettings, DataSettings, TrainSettings, RuntimeSettings)
FIELDS: dict[str, type[Record]] = {name: record for record in RECORDS for name in record.model_fields}
RECIPE_KEYS = ("name", "stages", "evaluation", "evaluate", *RunSettings.model_fields)
ALIASES = {
    "eval_dataset_size": "val_size",
    "model_max_length": "cutoff_len",
    **dict.fromkeys(("dpo_beta", "kto_beta", "orpo_beta"), "pref_beta"),
    **dict.fromkeys(("dpo_ftx", "kto_ftx"), "pref_ftx"),
    "dpo_loss": "pref_loss",
    "quantization_bit": "quant_bit",
    "quantization_type": "quant_type",
    "double_quant": "double_quantization",
    "new_special_tokens": "add_special_tokens",
    "use_liger_kernel": "enable_liger_kernel",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "max_completion_length": "max_new_tokens",
    "num_iterations": "ppo_epochs",
}
READING = [
    *("template", "cutoff_len", "overlong", "cut_answers", "mask_history", "train_on_prompt", "control_tokens"),
    *("default_system", "enable_thinking", "bad_rows", "bad_rows_limit", "max_samples", "model_revision", "bf16"),
    *("quant_bit", "quant_type", "double_quantization"),
    *(
        "dataset_dir",
        "preprocessing_num_workers",
        "preprocessing_dask",
        "per_device_eval_batch_size",
        "launcher",
        "slurm",
        "kubernetes",
    ),
]
"""Settings of a recipe that trains nothing."""
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
    """Those of `evaluation.perplexity` that are not among them: text for a stage of text, else what their rows are."""
    generate_sources: tuple[DataSource, ...]
    """Those of `evaluation.generate`."""
    template: str | None
    """Jinja text of the chat template; None: the model's own."""

    def references(self) -> dict[str, str]:
        """`model`, `ref_model` and `reward_model` where they name something, a stage or, but for `model`, any model."""
        train = self.train
        named = {"model": self.model.model, "ref_model": train.ref_model, "reward_model": train.reward_model}
        return {key: value for key, value in named.items() if value is not None}


def read_stage(
    name: str,
    settings: dict[str, Any],
    where: Any,
    evaluation: EvaluationSettings | None,
    problems: list[Problem],
    trains: bool = True,
) -> tuple[StageSettings | None, list[Problem]]:
    """A stage, where it is valid; and what is written in it, or above it, without effect."""
    for key in settings:
        if key in RECIPE_KEYS:
            problems.append(Problem(where(key), "is of the recipe, not of a stage", f"Write {key} above the stages."))
        elif key not in FIELDS:
            problems.append(Problem(where(key), "unknown key", did_you_mean(str(key), [*FIELDS, *RECIPE_KEYS])))
    if not NAME.fullmatch(name):
        problems.append(Problem(f"stages.{name}", "not a stage name", "Letters, digits, dot, dash, underscore."))
    stage = settings.get("stage", "sft")
    if isinstance(stage, str) and stage in STAGES:
        settings = dict(STAGES[stage].defaults) | settings
    parts = [
        read_record(record, {k: v for k, v in settings.items() if FIELDS.get(k) is record}, where, problems)
        for record in RECORDS
    ]
    model, data, train, runtime = parts
    dataset_dir = settings.get("dataset_dir") or None
    directory = (
        collect(problems, user_path, dataset_dir, where("dataset_dir")) if isinstance(dataset_dir, str) else None
    )
    for key in ("model_name_or_path", "adapter_name_or_path", "resume_from_checkpoint"):
        if isinstance(settings.get(key), str):
            collect(problems, user_path, settings[key], where(key))
    if trains and "dataset" not in settings:
        help_text = str(DataSettings.model_fields["dataset"].description).split("\n")[0]
        problems.append(Problem(where("dataset"), "missing, and it has no default", help_text))
    found = _Sources()
    template = None
    if isinstance(data, DataSettings):
        found = _all_sources(data, evaluation, directory, where, problems)
        template = collect(problems, template_text, data.template, where("template"))
    without_effect = _rules(settings, parts, where, problems)
    if isinstance(data, DataSettings):
        known = isinstance(train, TrainSettings) and train.stage in STAGES
        _data_rules(data, STAGES[train.stage].shape if known else "chat", found.training, where, problems)
    if not (
        isinstance(model, ModelSettings)
        and isinstance(data, DataSettings)
        and isinstance(train, TrainSettings)
        and isinstance(runtime, RuntimeSettings)
    ):
        return None, without_effect
    if evaluation is not None and evaluation.stride is not None and evaluation.stride >= data.cutoff_len:
        rule = (
            f"{evaluation.stride} is not below cutoff_len {data.cutoff_len}: nothing would stand before what is scored"
        )
        problems.append(Problem("evaluation.stride", rule, "E.g. half of cutoff_len."))
    given = (found.training, found.own, found.general, found.generate)
    return StageSettings(name, model, data, train, runtime, *given, template), without_effect


@dataclass(frozen=True)
class _Sources:
    """The data sets of a stage; those of `StageSettings`."""

    training: tuple[DataSource, ...] = ()
    own: tuple[DataSource, ...] = ()
    general: tuple[DataSource, ...] = ()
    generate: tuple[DataSource, ...] = ()


def _all_sources(
    data: DataSettings,
    evaluation: EvaluationSettings | None,
    directory: Path | None,
    where: Any,
    problems: list[Problem],
) -> _Sources:
    training = _sources(data.dataset, directory, where("dataset"), problems)
    own = _unique(_sources(data.eval_dataset, directory, where("eval_dataset"), problems))
    general, generate = (
        (
            _unique(_sources(wanted, directory, f"evaluation.{key}", problems))
            for key, wanted in (("perplexity", evaluation.perplexity), ("generate", evaluation.generate))
        )
        if evaluation is not None
        else ((), ())
    )
    known = (*own, *general, *generate)
    for source in known:
        if any(other.name == source.name and other != source for other in known):
            rule = f"two held-out data sets are named {source.name!r}; each is reported by its name"
            problems.append(Problem(where("eval_dataset"), rule, "Rename one of the files."))
    return _Sources(training, own, tuple(source for source in general if source not in own), generate)


def _unique(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    return tuple(source for number, source in enumerate(sources) if source not in sources[:number])


def _rules(
    settings: Mapping[str, Any], parts: list[Record | None], where: Any, problems: list[Problem]
) -> list[Problem]:
    """Names that must be known, and settings that exclude each other; those without effect are returned."""
    for key, registry in (("stage", STAGES), ("finetuning_type", METHODS), ("optim", OPTIMIZERS)):
        if isinstance(settings.get(key), str):
            collect(problems, registry.lookup, settings[key], where(key))
    kept_back = settings.get("val_size")
    if isinstance(kept_back, float) and kept_back > 1 and not kept_back.is_integer():
        rule = f"{kept_back} is neither a share below 1 nor a whole number of rows"
        problems.append(Problem(where("val_size"), rule, "E.g. 0.1 or 100."))
    for part in parts:
        _cluster_rules(part, where, problems)
    written = {key for key, value in settings.items() if value is not None}
    if all(parts):
        values = {key: value for part in parts if part for key, value in part}
        wanted = values["deepspeed"]
        config = collect(problems, deepspeed_config, wanted, where("deepspeed")) if wanted else None
        values |= {"zero_stage": zero_stage(config), "zero_only": zero_only(config)} if config is not None else {}
        for part in parts:
            values |= part.resolved() if isinstance(part, TrainSettings) else {}
            problems += reward_problems(part, where) if isinstance(part, TrainSettings) else []
        problems += [Problem(where(key), rule, cure) for key, rule, cure in refused(values)]
        return [Problem(where(key), rule, cure) for key, rule, cure in idle(values, written)]
    return []


def _cluster_rules(part: Record | None, where: Any, problems: list[Problem]) -> None:
    """What is said about clusters has to be something that they understand, also where another launcher is chosen."""
    if isinstance(part, RuntimeSettings):
        problems += [Problem(where(f"slurm.{key}"), *rest) for key, *rest in slurm_problems(part.slurm or {})]
        if part.kubernetes is not None or part.launcher == "kubernetes":
            read_record(KubernetesSettings, part.kubernetes or {}, lambda key: where(f"kubernetes.{key}"), problems)


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
            found.append(collect(problems, find_dataset, values, directory, f"{where}[{index}]"))
        else:
            found.append(collect(problems, find_dataset, item, directory, where))
    return tuple(source for source in found if source is not None)


def collect(problems: list[Problem], function: Any, *arguments: Any) -> Any:
    """Call, and keep the problems instead of stopping at the first."""
    try:
        return function(*arguments)
    except InputError as error:
        problems.extend(error.problems)
        return None


def read_record(record: type[Record], values: Any, where: Any, problems: list[Problem]) -> Any:
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
