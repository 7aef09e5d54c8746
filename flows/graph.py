"""From a recipe to steps: what depends on what. Nothing runs here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from registry.home import Home
from registry.recipe import Recipe, StageSettings
from registry.stages import METHODS, STAGES
from tasks.digests import DigestMemory
from tasks.evaluation import evaluate_step
from tasks.fetch import KEPT_BACK, ROWS, fetch_step
from tasks.model import base_input
from tasks.render import render_step
from tasks.shards import tokenize_step
from tasks.steps import Input, LocalFolder, Step, require_folder, upstream
from tasks.training import merge_step, train_step

BASE = "base"
DATA_STEPS = ("model", "download", "fetch", "render", "tokenize")


@dataclass(frozen=True)
class StageSteps:
    """The steps of one stage that others, and reports, refer to."""

    settings: StageSettings
    rendered: Step
    tokenized: Step
    trained: Step
    model: Step
    """Makes the weights that come out: the merge, or the training itself for full tuning."""
    held_out: dict[str, Step] = field(default_factory=dict)
    """Data set name → its tokenize step."""
    evaluated: Step | None = None


@dataclass(frozen=True)
class Pipeline:
    """Everything a recipe asks for, in an order in which it can be done."""

    recipe: Recipe
    steps: tuple[Step, ...]
    stages: dict[str, StageSteps]
    base_evaluated: Step | None = None

    def data_only(self) -> Pipeline:
        """The data steps alone."""
        return replace(self, steps=tuple(step for step in self.steps if step.kind in DATA_STEPS))


def build(recipe: Recipe, home: Home, strict_versions: bool = False) -> Pipeline:
    """The steps of a recipe.

    Args:
        recipe: validated.
        home: for remembered digests, and models kept there.
        strict_versions: let versions of torch, transformers and their like enter the keys.

    Raises:
        InputError: a model or folder that does not exist.
    """
    memory = DigestMemory(home.digests)
    stages: dict[str, StageSteps] = {}
    base_evaluated = None
    for settings in recipe.stages:
        base, base_name = base_input(settings.model.model_name_or_path, settings.model.model_revision, home)
        steps = _stage(recipe, settings, base, base_name, memory)
        stages[settings.name] = steps
        if steps.evaluated and recipe.evaluation.compare_with == "base":
            base_evaluated = evaluate_step(BASE, base_name, base, steps.held_out, recipe.evaluation, settings)
    ends = [step for stage in stages.values() for step in (stage.evaluated or stage.model, base_evaluated) if step]
    ordered = tuple(upstream(ends))
    if strict_versions:
        return build_strict(Pipeline(recipe, ordered, stages, base_evaluated))
    return Pipeline(recipe, ordered, stages, base_evaluated)


def build_strict(pipeline: Pipeline) -> Pipeline:
    """The same steps with `strict_versions` set, references included."""
    made: dict[int, Step] = {}
    for step in pipeline.steps:
        inputs = {
            name: replace(i, source=made[id(i.source)]) if isinstance(i.source, Step) else i
            for name, i in step.inputs.items()
        }
        made[id(step)] = replace(step, inputs=inputs, strict_versions=True)
    stages = {
        name: StageSteps(
            stage.settings,
            made[id(stage.rendered)],
            made[id(stage.tokenized)],
            made[id(stage.trained)],
            made[id(stage.model)],
            {key: made[id(step)] for key, step in stage.held_out.items()},
            made[id(stage.evaluated)] if stage.evaluated else None,
        )
        for name, stage in pipeline.stages.items()
    }
    base = made[id(pipeline.base_evaluated)] if pipeline.base_evaluated else None
    return Pipeline(pipeline.recipe, tuple(made.values()), stages, base)


def _stage(recipe: Recipe, settings: StageSettings, base: Input, base_name: str, memory: DigestMemory) -> StageSteps:
    stage, data, train = settings.name, settings.data, settings.train
    label = f"{recipe.name}-{stage}"
    shape, runtime = STAGES[train.stage].shape, settings.runtime
    fetched = fetch_step(stage, "fetch", settings.sources, data, runtime, shape, train.seed, memory, split=True)
    rendered = render_step(stage, "render", fetched, ROWS, base, data, settings.template)
    mixture = _mixture(settings)
    tokenized = tokenize_step(stage, "tokenize", rendered, base, data, data.packing, mixture)
    held_out = _held_out(settings, fetched, base, memory)
    adapter = _adapter(settings)
    trained = train_step(label, base, base_name, tokenized, adapter, settings)
    adapts = METHODS[train.finetuning_type].makes == "adapter"
    model = merge_step(stage, label, base, trained) if adapts else trained
    evaluated = None
    if held_out or recipe.evaluation.questions:
        evaluated = evaluate_step(stage, label, Input(model), held_out, recipe.evaluation, settings)
    return StageSteps(settings, rendered, tokenized, trained, model, held_out, evaluated)


def _mixture(settings: StageSettings) -> dict[str, Any] | None:
    """How the data sets of a stage are mixed; None: every row once, in order."""
    data, sources = settings.data, settings.sources
    repeats = [source.repeat for source in sources]
    if data.mix_strategy == "concat" or len(sources) == 1:
        return {"strategy": "concat", "repeats": repeats} if max(repeats) > 1 else None
    shares = list(data.interleave_probs) or [source.weight for source in sources]
    mixture = {"strategy": data.mix_strategy, "repeats": repeats, "probabilities": shares}
    return mixture | {"seed": settings.train.seed}


def _held_out(settings: StageSettings, fetched: Step, base: Input, memory: DigestMemory) -> dict[str, Step]:
    """Held-out data sets, each by its own name, and the rows kept back by `val_size` as `validation`."""
    stage, data, train, runtime = settings.name, settings.data, settings.train, settings.runtime
    shape = STAGES[train.stage].shape
    parts: dict[str, tuple[Step, str]] = {}
    if data.val_size:
        parts["validation"] = (fetched, KEPT_BACK)
    for source in settings.eval_sources:
        name = f"fetch:{source.name}"
        step = fetch_step(stage, name, (source,), data, runtime, shape, train.seed, memory, split=False)
        parts[source.name] = (step, ROWS)
    held_out = {}
    for name, (step, part) in parts.items():
        rendered = render_step(stage, f"render:{name}", step, part, base, data, settings.template)
        held_out[name] = tokenize_step(stage, f"tokenize:{name}", rendered, base, data, packing=False)
    return held_out


def _adapter(settings: StageSettings) -> Input | None:
    from pathlib import Path

    if settings.model.adapter_name_or_path is None:
        return None
    path = Path(settings.model.adapter_name_or_path)
    require_folder(path, "adapter_name_or_path")
    return Input(LocalFolder(path), ("*.safetensors", "*.json"))
