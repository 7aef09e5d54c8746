"""The settings of a recipe as a form: a JSON schema with types, choices, descriptions and the recipe's own values.

One decision: the form has the shape of the recipe's file. What the file says stands where it says it, with its value as
the default; beside it stand the settings of COMMON, empty. What is filled in is laid over the recipe, see
`registry.loading.overlay`, so everything that is left empty stays as the recipe has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from registry.core import Registry, read_text, read_yaml
from registry.evaluation_records import EvaluationSettings
from registry.loading import find_recipe
from registry.optimizers import OPTIMIZERS
from registry.record import Record, list_of_one
from registry.records import RunSettings
from registry.stage_settings import FIELDS, RECIPE_KEYS
from registry.stages import METHODS, STAGES

COMMON = (
    *("dataset", "eval_dataset", "template", "cutoff_len", "finetuning_type", "lora_rank", "learning_rate"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)
"""Settings of a stage that a form offers also where the recipe says nothing of them."""
ABOVE = ("model_name_or_path", "finetuning_type")
"""The same, above the stages."""
MEASURED = ("perplexity", "benchmarks", "generate", "gate")
"""The same, of `evaluation`."""
NAMES: dict[str, Registry[Any]] = {"stage": STAGES, "finetuning_type": METHODS, "optim": OPTIMIZERS}
Form = dict[str, Any]


def recipe_form(name: str) -> Form:
    """The form of a recipe, by name or path; settings in words of others stay as they are written there."""
    raw = read_yaml(read_text(find_recipe(name)), name)
    if "stages" not in raw:
        return stage_form()
    above = {key: value for key, value in raw.items() if key not in RECIPE_KEYS}
    stages = {
        stage: _object(
            f"Stage {stage}: {STAGES[kind].description}",
            {key: _setting(key, own | STAGES[kind].defaults, own) for key in _keys(own, COMMON, above)},
        )
        for stage, own in raw["stages"].items()
        for kind in [own.get("stage", above.get("stage", "sft"))]
    }
    fields = {key: _setting(key, {}, above) for key in _keys(above, ABOVE, {})}
    fields["stages"] = _object("The stages of the recipe, and what each has of its own.", stages)
    fields |= {key: _of_record(RunSettings, key, {}, raw) for key in RunSettings.model_fields}
    fields["evaluation"] = _evaluation(raw.get("evaluation", {}))
    return _object(f"Settings of the recipe {name}. What is left empty stays as the recipe has it.", fields)


def stage_form() -> Form:
    """The form of a recipe of one stage, of which nothing is known yet."""
    words = "A recipe of one stage, in place of a named one; with a named one, settings above its stages."
    name = {"type": "string", "description": "Name of the recipe, under which its runs and its model are found."}
    fields: Form = {"name": name} | {key: _setting(key, {}, {}) for key in ("stage", *ABOVE, *COMMON)}
    fields |= {key: _of_record(RunSettings, key, {}, {}) for key in RunSettings.model_fields}
    return _object(words, fields | {"evaluation": _evaluation({})})


def _keys(own: Mapping[str, Any], common: Iterable[str], above: Mapping[str, Any]) -> list[str]:
    """What is written, but for what names another stage, and what is offered beside it."""
    fixed = ("stage", "model", "reward_model", "ref_model")
    added = [key for key in common if key not in own and key not in above]
    return [*(key for key in own if key in FIELDS and key not in fixed), *added]


def _evaluation(written: Mapping[str, Any]) -> Form:
    fields = {key: _of_record(EvaluationSettings, key, {}, written) for key in dict.fromkeys([*written, *MEASURED])}
    return _object(str(EvaluationSettings.__doc__), fields)


def _object(description: str, fields: Mapping[str, Form]) -> Form:
    placed = {key: field | {"title": key, "position": place} for place, (key, field) in enumerate(fields.items())}
    return {"type": "object", "description": description, "properties": placed, "additionalProperties": False}


@cache
def _properties(record: type[Record]) -> dict[str, Form]:
    found: dict[str, Form] = record.model_json_schema()["properties"]
    return found


def _setting(name: str, defaults: Mapping[str, Any], written: Mapping[str, Any]) -> Form:
    return _of_record(FIELDS[name], name, defaults, written)


def _of_record(record: type[Record], name: str, defaults: Mapping[str, Any], written: Mapping[str, Any]) -> Form:
    """One field.

    Args:
        record: that has it.
        name: of the setting.
        defaults: of the stage, before those of the record.
        written: in the recipe; its value is the default of the form.
    """
    schema = dict(_properties(record)[name])
    default = defaults.get(name, schema.pop("default", None))
    (kind,) = [each for each in schema.pop("anyOf", [schema]) if each.get("type") != "null"]
    field = {key: value for key, value in kind.items() if key not in ("description", "title")}
    text = " ".join(str(record.model_fields[name].description).split())
    if name in NAMES:
        field["enum"] = [each for each, entry in NAMES[name].items() if not getattr(entry, "refused", None)]
    if name == "max_steps":
        field["minimum"] = -1  # what takes back the recipe's; an empty field leaves it
    if field["type"] == "array":
        field.pop("minLength", None)  # of a list pydantic means its length
        if "oneOf" in field["items"]:  # names, or mappings as people write them in files
            field["items"] = {"type": "string"}
    if name in written:
        value = written[name]
        field["default"] = list(list_of_one(value)) if field["type"] == "array" else value
    elif default not in (None, [], ()):
        text += f" Default: {default}."
    return field | {"description": text}
