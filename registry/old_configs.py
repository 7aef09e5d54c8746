"""Configs of LLaMA-Factory and of the LLamaTuner before this one, as recipes.

One decision: they are read by what they say, not by where they come from, so any recipe may use these words. Each is
told of: what is read as another setting, and what has no effect, in the notes; what cannot be, as a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from registry.errors import Problem, shown
from registry.evaluation_records import GenerationSettings
from registry.old_keys import OLD_KEYS, SECRET, TRANSFORMERS
from registry.old_values import CONVERSIONS
from registry.stage_settings import ALIASES, FIELDS, READING

Where = Callable[[str], str]
UNTRAINED = "nothing is trained"
NO_CHAT = ("fewshot", "empty", "vanilla", "default")
TASKS = {"mmlu": "mmlu", "ceval": "ceval", "cmmlu": "cmmlu"}
"""What stands before the split in `task` → our benchmark."""
SHOTS = 5  # of LLaMA-Factory, where nothing is said
DRAWN = {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50}
"""How LLaMA-Factory writes answers where nothing is said."""
PREDICTING = ("do_train", "do_eval", "do_predict", "predict_with_generate")


@dataclass
class Translated:
    """Settings in the words of this project, and what became of those that were others."""

    settings: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    """Key → what it is read as."""
    without_effect: dict[str, str] = field(default_factory=dict)
    """Key → why."""
    problems: list[Problem] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    """Setting → the key it was made from."""

    def notes(self, where: Where) -> list[str]:
        """What people are told: a line for each reading, and one for each reason."""
        return [f"{where(key)} is read as {text}" for key, text in self.renamed.items()] + self.reasons(where)

    def reasons(self, where: Where) -> list[str]:
        """What has no effect, a line for each reason."""
        reasons: dict[str, list[str]] = {}
        for key, why in self.without_effect.items():
            reasons.setdefault(why, []).append(where(key))
        return [f"{', '.join(keys)}: no effect; {why}" for why, keys in reasons.items()]


def translate(settings: Mapping[str, Any], where: Where) -> Translated:
    """Settings of a stage from whatever words they are written in; unknown ones stay as they are.

    Args:
        settings: as written, those of the recipe's top level included.
        where: key → its place in the recipe.
    """
    found = Translated()
    meant: dict[str, Any] = {}
    for key, value in settings.items():
        name = ALIASES.get(key, key)
        if name != key and name in settings and settings[name] != value:
            rule = f"{key} {shown(value)} and {name} {shown(settings[name])} are one setting"
            found.problems.append(Problem(where(key), rule, "Remove one of them."))
        if name != key:
            found.renamed[key] = name
            found.origins[name] = key
        convert = CONVERSIONS.get(name)
        meaning = convert(value, settings) if convert else None
        if meaning is None:
            _as_it_is(key, name, value, where, found)
        elif meaning.refused:
            found.problems.append(Problem(where(key), f"{shown(value)}: {meaning.refused}", meaning.cure))
        else:
            meant |= meaning.settings
            found.origins |= dict.fromkeys(meaning.settings, key)
            if not meaning.silent:
                words = ", ".join(f"{k}: {_yaml(v)}" for k, v in meaning.settings.items())
                found.renamed[key] = words
    found.settings |= meant
    return found


def _as_it_is(key: str, name: str, value: Any, where: Where, found: Translated) -> None:
    old = OLD_KEYS.get(name)
    if name in FIELDS or (old is None and name not in TRANSFORMERS):
        found.settings[name] = value
    elif old is None:
        if value is not None:
            rule = "an argument of transformers' TrainingArguments that is not supported here"
            found.problems.append(Problem(where(key), rule, "Remove it; docs/settings.md has what there is."))
    elif old.asks_nothing(value):
        pass
    elif not old.refused:
        found.without_effect[key] = old.why
    else:
        rule = old.why if old.why == SECRET or old.harmless == () else f"{shown(value)}: {old.why}"
        found.problems.append(Problem(where(key), rule, old.cure))


def _yaml(value: Any) -> str:
    return shown(value) if value is None or isinstance(value, bool) else str(value)


def measures_only(raw: Mapping[str, Any]) -> bool:
    """Whether a config without stages asks for a measurement and no training."""
    if "stages" in raw or "evaluate" in raw or raw.get("do_train"):
        return False
    return bool(raw.get("task") or raw.get("do_predict") or (raw.get("do_eval") and raw.get("do_train") is False))


def as_measurement(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Translated]:
    """The recipe that measures a model from a config of `eval`, or of `train` with `do_predict`.

    Args:
        raw: the config; see `measures_only`.
    """
    model = raw.get("adapter_name_or_path") or raw.get("model_name_or_path")
    model = model[0] if isinstance(model, list) and len(model) == 1 else model
    task = raw.get("task")
    benchmark = ("task", "n_shot", "batch_size", "template", "seed")
    answers = (*GenerationSettings.model_fields, *PREDICTING, "eval_dataset", "dataset")
    names = {"model_name_or_path", "adapter_name_or_path", "name", "evaluation", *(benchmark if task else answers)}
    found = translate({key: value for key, value in raw.items() if key not in names}, lambda key: key)
    asked = _benchmark(raw, found) if task else _predicted(raw, found)
    kept = {key: value for key, value in found.settings.items() if key in READING or key not in FIELDS}
    for key in found.settings:
        if key not in kept:
            origin = found.origins.get(key, key)
            found.renamed.pop(origin, None)
            found.without_effect[origin] = UNTRAINED
    if isinstance(raw.get("evaluation"), dict):
        asked |= raw["evaluation"]
    if raw.get("adapter_name_or_path") and raw.get("model_name_or_path"):
        found.without_effect["model_name_or_path"] = "an adapter is measured on the base that its config names"
    named = {"name": raw["name"]} if "name" in raw else {}
    found.settings = {**named, "evaluate": model, **kept, "evaluation": asked}
    return found.settings, found


def _benchmark(raw: Mapping[str, Any], found: Translated) -> dict[str, Any]:
    name = TASKS.get(str(raw["task"]).split("_")[0])
    if name is None:
        rule = f"{shown(raw['task'])} is none of mmlu_test, ceval_validation, cmmlu_test"
        found.problems.append(Problem("task", rule, "Use `llamatuner evaluate MODEL --benchmarks TASK`."))
    found.renamed["task"] = f"benchmarks: [{name}] of evaluation"
    asked: dict[str, Any] = {"benchmarks": [name or "mmlu"], "num_fewshot": raw.get("n_shot", SHOTS)}
    if "n_shot" in raw:
        found.renamed["n_shot"] = "num_fewshot of evaluation"
    if raw.get("batch_size") is not None:
        found.settings["per_device_eval_batch_size"] = raw["batch_size"]
        found.origins["per_device_eval_batch_size"] = "batch_size"
        found.renamed["batch_size"] = "per_device_eval_batch_size"
    template = raw.get("template")
    if template in NO_CHAT or template is None:
        found.without_effect |= {"template": "questions are asked as plain text"} if template else {}
    else:
        found.settings["template"] = template
        asked["apply_chat_template"] = True
        found.renamed["template"] = "the same, and apply_chat_template: true of evaluation"
    asked |= {"seed": raw["seed"]} if raw.get("seed") is not None else {}
    return asked | {"compare_with": "none"}


def _predicted(raw: Mapping[str, Any], found: Translated) -> dict[str, Any]:
    """What `do_predict` or `do_eval` measures: answers written anew where it says so, else the loss of those there."""
    data = raw.get("eval_dataset")
    if not data:
        cure = "Name the data sets to measure as eval_dataset."
        found.problems.append(Problem("eval_dataset", "there is nothing to measure", cure))
    if raw.get("stage", "sft") != "sft":
        rule = f"stage {raw['stage']} measures after its training only"
        found.problems.append(Problem("do_predict", rule, "Use `llamatuner evaluate MODEL --perplexity DATA`."))
    if not (raw.get("do_predict") and raw.get("predict_with_generate")):
        found.renamed["eval_dataset"] = "perplexity of evaluation"
        return {"perplexity": data or [], "compare_with": "none"}
    found.renamed["eval_dataset"] = "generate of evaluation"
    given = {key: raw[key] for key in GenerationSettings.model_fields if raw.get(key) is not None}
    drawn = dict(DRAWN) | given
    if not drawn["do_sample"]:
        drawn = {key: value for key, value in drawn.items() if key not in ("temperature", "top_p", "top_k")}
    words = ", ".join(f"{key}: {_yaml(value)}" for key, value in drawn.items())
    found.renamed["predict_with_generate"] = f"answers written as LLaMA-Factory does: {words}"
    return {"generate": data or [], **drawn, "compare_with": "none"}


def as_recipe(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """A config without `stages` in the form of a recipe, as far as the form is another one: what measures a model, or
    writes answers after training; with notes and problems. Anything else comes back as it is."""
    if measures_only(raw):
        recipe, found = as_measurement(raw)
        return recipe, found.notes(lambda key: key), found.problems
    asks = raw.get("do_predict") and raw.get("predict_with_generate") and raw.get("eval_dataset")
    if "stages" in raw or "evaluate" in raw or not asks or raw.get("stage", "sft") != "sft":
        return dict(raw), [], []
    found = Translated()
    asked = _predicted(raw, found)
    asked.pop("compare_with")
    found.renamed["eval_dataset"] = "the same, and generate of evaluation"
    own = raw["evaluation"] if isinstance(raw.get("evaluation"), dict) else {}
    drawn = {*GenerationSettings.model_fields, "do_predict", "predict_with_generate"} - {"seed"}
    kept = {key: value for key, value in raw.items() if key not in drawn}
    return kept | {"evaluation": asked | own}, found.notes(lambda key: key), found.problems
