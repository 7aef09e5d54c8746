"""From a recipe that trains nothing to steps: what measures one model, and the one it is compared with."""

from __future__ import annotations

from dataclasses import replace

from flows.graph import BASE, Pipeline, require_metrics
from flows.measuring import HeldOut, Measured, held_out, measuring_steps
from flows.named_models import NamedModel, find_model
from flows.reward_models import find_reward_model
from registry.home import Home
from registry.recipe import Evaluated, Recipe
from registry.stage_settings import StageSettings
from tasks.digests import DigestMemory
from tasks.steps import Input, LocalFolder, upstream

MODEL = "model"
TOKENIZER = "tokenizer.json"


def build_evaluation(recipe: Recipe, home: Home) -> Pipeline:
    """The steps of a recipe with `evaluate`.

    Raises:
        InputError: a model that is not there, rows of no known form, a gate on what is not measured.
    """
    assert recipe.evaluates is not None
    memory, evaluation = DigestMemory(home.digests), recipe.evaluation
    settings = recipe.evaluates.settings
    found = find_model(recipe.evaluates.model, home, settings.model.model_revision)
    settings = as_trained(recipe.evaluates, found)
    rows = held_out(settings, None, found.model, memory)
    other = found.base
    if evaluation.compare_with not in ("base", "none"):
        other = find_model(evaluation.compare_with, home, where="evaluation.compare_with")
    asked = evaluation.reward_model
    reward = find_reward_model(asked, recipe.name, {}, home) if asked else None
    before: Measured | None = None
    if other is not None and evaluation.compare_with != "none":
        theirs = rows if _same_tokenizer(found, other) else _rows_of(other, settings, memory)
        before = Measured(measuring_steps(BASE, "", other.name, other.model, theirs, recipe, settings, reward))
    own = measuring_steps(MODEL, "", found.name, found.model, rows, recipe, settings, reward, before)
    measured = {BASE: before, MODEL: Measured(own, BASE)} if before is not None else {MODEL: Measured(own)}
    ends = [step for each in measured.values() for step in each.steps]
    pipeline = Pipeline(recipe, tuple(upstream(ends)), {}, measured)
    require_metrics(pipeline)
    return pipeline


def as_trained(evaluated: Evaluated, found: NamedModel) -> StageSettings:
    """How rows are read: as the recipe says, else as they were for the stage that made the model."""
    settings, kept = evaluated.settings, {k: v for k, v in found.reading.items() if k not in evaluated.given}
    template = kept.pop("template", settings.template)
    bf16 = kept.pop("bf16", settings.train.bf16)
    data = settings.data.model_copy(update=kept)
    return replace(settings, data=data, train=settings.train.model_copy(update={"bf16": bf16}), template=template)


def _same_tokenizer(one: NamedModel, other: NamedModel) -> bool:
    """Whether two models on this disk read texts as the same ids; unknown is no."""
    files = [_tokenizer(each.model) for each in (one, other)]
    return None not in files and files[0] == files[1]


def _tokenizer(model: Input) -> bytes | None:
    path = model.source.path / TOKENIZER if isinstance(model.source, LocalFolder) else None
    return path.read_bytes() if path is not None and path.is_file() else None


def _rows_of(model: NamedModel, settings: StageSettings, memory: DigestMemory) -> HeldOut:
    return held_out(replace(settings, name=BASE), None, model.model, memory)
