"""From a recipe to steps: what depends on what. Nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.measuring import ANY, HeldOut, Measured, held_out, known_metrics, measuring_steps
from flows.named_models import NamedModel
from flows.reward_models import find_reward_model, reading_of, require_rm_stage
from registry.errors import InputError, Problem, did_you_mean
from registry.gates import condition
from registry.home import Home
from registry.recipe import Recipe
from registry.records import RuntimeSettings
from registry.stage_settings import StageSettings
from registry.stages import METHODS, STAGES
from tasks.devices import cuda_devices
from tasks.digests import DigestMemory
from tasks.fetch import ROWS, fetch_step
from tasks.launchers.job import Cluster
from tasks.model import base_input
from tasks.nodes import nodes_of_environment
from tasks.render import render_step
from tasks.shards import tokenize_step
from tasks.steps import DATA_STEPS, Input, LocalFolder, Step, require_folder, upstream
from tasks.train.given import REWARD_ADAPTER, REWARD_MODEL, STATE_FILES, WEIGHT_FILES, require_checkpoint
from tasks.training import merge_step, train_step
from tasks.vocabulary import add_tokens_step

BASE, LOCAL = "base", "local"


@dataclass(frozen=True)
class StageSteps:
    """The steps of one stage that others, and reports, refer to."""

    settings: StageSettings
    rendered: Step
    tokenized: Step
    trained: Step
    model: Step
    """Makes the weights that come out: the merge, or the training itself where it makes all of them."""
    held_out: HeldOut


@dataclass(frozen=True)
class Pipeline:
    """Everything a recipe asks for, in an order in which it can be done."""

    recipe: Recipe
    steps: tuple[Step, ...]
    stages: dict[str, StageSteps]
    measured: dict[str, Measured] = field(default_factory=dict)
    """What is measured, what is compared with first: a stage's name, `base`, or `sft:dpo` for stage sft's model on
    stage dpo's data sets."""

    def data_only(self) -> Pipeline:
        """The data steps alone; nothing is measured, so no gate decides."""
        return replace(self, steps=tuple(step for step in self.steps if step.kind in DATA_STEPS), measured={})

    def results(self) -> set[str]:
        """Titles of the steps whose artifacts people and reports want: what was trained, and what it was measured as.

        The others are needed on a machine only where a step that runs there reads them. With the data steps alone
        everything is wanted.
        """
        kept = {step.title for stage in self.stages.values() for step in (stage.trained, stage.model)}
        kept |= {step.title for each in self.measured.values() for step in each.steps}
        everything = {step.title for step in self.steps}
        return kept & everything or everything

    def befores(self) -> list[str]:
        """Labels of what is measured to compare with."""
        named = {each.before for each in self.measured.values()}
        return [label for label in self.measured if label in named]


@dataclass(frozen=True)
class Start:
    """The model that a stage begins with."""

    model: Input
    name: str
    """For people: registry name, hub id, folder name or recipe and stage."""
    stage: str = BASE
    """The stage that made it."""


def build(recipe: Recipe, home: Home, strict_versions: bool = False) -> Pipeline:
    """The steps of a recipe.

    Args:
        recipe: validated; its stages come behind those they start from.
        home: for remembered digests, and models kept there.
        strict_versions: let versions of torch, transformers and their like enter the keys.

    Raises:
        InputError: a model or folder that does not exist.
    """
    if recipe.evaluates is not None:
        from flows.evaluating import build_evaluation  # which is made of what is here

        pipeline = build_evaluation(recipe, home)
        pipeline = on_clusters(pipeline, {BASE: recipe.evaluates.settings.runtime}, home)
        return build_strict(pipeline) if strict_versions else pipeline
    memory = DigestMemory(home.digests)
    stages: dict[str, StageSteps] = {}
    starts: dict[str, Start] = {}
    for settings in map(settled, recipe.stages):
        start = _start(settings.model.model, settings, stages, recipe, home)
        given = _adapter(settings) if settings.train.create_new_adapter else None
        if given:
            label = f"{recipe.name}-{settings.name}-start"
            merged = merge_step(settings.name, label, start.model, given, "merge:adapter")
            start = replace(start, model=Input(merged))
        start = _with_tokens(recipe, settings, start, stages)
        reference = None
        named = settings.train.ref_model
        if named is not None:
            where = f"stages.{settings.name}.ref_model"
            reference = Input(stages[named].model) if named in stages else _named_model(named, where, home)
        rewards = _rewards(settings, start, stages, home)
        starts[settings.name] = start
        judge = stages.get(settings.train.reward_model or "")
        reading = reading_of(judge.settings) if judge else {}
        stages[settings.name] = _stage(recipe, settings, start, reference, rewards, reading, memory)
    asked = recipe.evaluation.reward_model
    reward = find_reward_model(asked, recipe.name, stages, home) if asked else None
    measured = _measured(recipe, stages, starts, reward)
    pipeline = Pipeline(recipe, (), stages, measured)
    require_metrics(pipeline)
    ends: list[Step] = []
    for name, stage in stages.items():
        ends += [stage.model, *(measured[name].steps if name in measured else ())]
    ends += [step for label, each in measured.items() if label not in stages for step in each.steps]
    pipeline = replace(pipeline, steps=tuple(upstream(ends)))
    pipeline = on_clusters(pipeline, {name: stage.settings.runtime for name, stage in stages.items()}, home)
    return build_strict(pipeline) if strict_versions else pipeline


def _measured(
    recipe: Recipe, stages: dict[str, StageSteps], starts: dict[str, Start], reward: NamedModel | None
) -> dict[str, Measured]:
    """What measures the model of every stage, behind what measures those that they are compared with."""
    befores: dict[str, Measured] = {}
    afters: dict[str, Measured] = {}
    from_base = sum(settings.model.model is None for settings in recipe.stages)
    for name, steps in stages.items():
        settings, start, rows, before = steps.settings, starts[name], steps.held_out, None
        if recipe.evaluation.compare_with == "base" and STAGES[settings.train.stage].makes_text:
            alone = start.stage == BASE and from_base == 1
            before, ending = (BASE, "") if alone else (f"{start.stage}:{name}", f":{name}")
            given = (start.name, start.model, rows, recipe, settings, reward)
            befores[before] = Measured(measuring_steps(start.stage, ending, *given))
        given = (f"{recipe.name}-{name}", Input(steps.model), rows, recipe, settings, reward)
        own = measuring_steps(name, "", *given, befores.get(before or ""))
        if own:
            afters[name] = Measured(own, before)
    return {label: each for label, each in befores.items() if each.steps} | afters


def gated(pipeline: Pipeline) -> str | None:
    """Label of the model that a gate decides on: the last one that is measured, and not to compare with only."""
    return next((label for label in reversed(pipeline.measured) if label not in pipeline.befores()), None)


def require_metrics(pipeline: Pipeline) -> None:
    """Refuse a gate on a metric that no evaluation makes, before anything is computed.

    Raises:
        InputError: nothing is measured, or not that.
    """
    conditions, name = [condition(text) for text in pipeline.recipe.evaluation.gate], gated(pipeline)
    if not conditions:
        return
    if name is None:
        rule = "nothing is measured on held-out rows"
        raise InputError(Problem("evaluation.gate", rule, "Set val_size, eval_dataset or evaluation.perplexity."))
    known = known_metrics(pipeline.measured[name].steps)
    unknown = [each for each in conditions if not {each.metric, f"{ANY}.{each.metric.partition('.')[2]}"} & {*known}]
    if unknown:
        raise InputError(
            [
                Problem("evaluation.gate", f"{e.text!r}: stage {name} has no {e.metric}", did_you_mean(e.metric, known))
                for e in unknown
            ]
        )


def settled(settings: StageSettings) -> StageSettings:
    """The settings of a stage with the number of processes: as set, or one per visible CUDA device.

    Raises:
        InputError: a cluster has machines of its own, and nobody said how many devices they have.
    """
    launcher, given = settings.runtime.launcher, settings.train.nproc_per_node
    if launcher != LOCAL and given is None:
        rule = f"launcher {launcher}: this machine does not know how many devices the cluster's have"
        where = f"stages.{settings.name}.nproc_per_node"
        raise InputError(Problem(where, rule, "Set it: processes of each machine, one for each device."))
    if launcher != LOCAL and nodes_of_environment().count > 1:
        rule = f"launcher {launcher} deals out machines itself, and the environment says that this is one of several"
        raise InputError(Problem("NNODES", rule, "Unset it, and set nnodes in the recipe."))
    processes = given or max(1, len(cuda_devices()))
    return replace(settings, train=settings.train.model_copy(update={"nproc_per_node": processes}))


def _named_model(named: str, where: str, home: Home) -> Input:
    """A model by registry name, hub id or folder.

    Raises:
        InputError: there is none; named by the key it was written under.
    """
    try:
        return base_input(named, "main", home)[0]
    except InputError as error:
        raise InputError([replace(problem, where=where) for problem in error.problems]) from error


def _start(
    named: str | None, settings: StageSettings, stages: dict[str, StageSteps], recipe: Recipe, home: Home
) -> Start:
    """The model of an earlier stage, or one by name; None: the stage's own base."""
    if named in stages:
        return Start(Input(stages[named].model), f"{recipe.name}-{named}", named)
    model, name = base_input(named or settings.model.model_name_or_path, settings.model.model_revision, home)
    return Start(model, name)


def _with_tokens(recipe: Recipe, settings: StageSettings, start: Start, stages: dict[str, StageSteps]) -> Start:
    """The same, behind a step that adds the tokens which a stage wants and none that it starts from has added."""
    known: set[str] = set()
    earlier = settings.model.model
    while earlier in stages:
        model = stages[earlier].settings.model
        known |= {*model.add_tokens, *model.add_special_tokens}
        earlier = model.model
    tokens, special = (
        [token for token in wanted if token not in known]
        for wanted in (settings.model.add_tokens, settings.model.add_special_tokens)
    )
    if not tokens and not special:
        return start
    label = f"{recipe.name}-{settings.name}-start"
    return replace(start, model=Input(add_tokens_step(settings.name, label, start.model, tokens, special)))


def build_strict(pipeline: Pipeline) -> Pipeline:
    """The same steps with `strict_versions` set, references included."""
    return _changed(pipeline, lambda step: replace(step, strict_versions=True))


def on_clusters(pipeline: Pipeline, runtimes: Mapping[str, RuntimeSettings], home: Home) -> Pipeline:
    """The same steps; those that compute with a model where their stage's programs run.

    Args:
        pipeline: the steps.
        runtimes: of the stages; what belongs to none, as the base model's evaluation, goes with the first.
        home: seen by all machines.
    """
    first = next(iter(runtimes.values()))
    if all(runtime.launcher == LOCAL for runtime in runtimes.values()):
        return pipeline

    def place(step: Step) -> Step:
        runtime = runtimes.get(step.stage, first)
        if not step.devices or runtime.launcher == LOCAL:
            return step
        options = runtime.slurm if runtime.launcher == "slurm" else runtime.kubernetes
        return replace(step, devices=0, cluster=Cluster(runtime.launcher, options or {}, str(home.path)))

    return _changed(pipeline, place)


def _changed(pipeline: Pipeline, change: Callable[[Step], Step]) -> Pipeline:
    """The same pipeline with every step changed, references included."""
    made: dict[int, Step] = {}
    for step in pipeline.steps:
        inputs = {
            name: replace(i, source=made[id(i.source)]) if isinstance(i.source, Step) else i
            for name, i in step.inputs.items()
        }
        made[id(step)] = change(replace(step, inputs=inputs))
    stages = {
        name: replace(
            stage,
            rendered=made[id(stage.rendered)],
            tokenized=made[id(stage.tokenized)],
            trained=made[id(stage.trained)],
            model=made[id(stage.model)],
            held_out=stage.held_out.mapped(made),
        )
        for name, stage in pipeline.stages.items()
    }
    measured = {
        label: replace(each, steps=tuple(made[id(step)] for step in each.steps))
        for label, each in pipeline.measured.items()
    }
    return Pipeline(pipeline.recipe, tuple(made.values()), stages, measured)


def _rewards(settings: StageSettings, start: Start, stages: dict[str, StageSteps], home: Home) -> dict[str, Input]:
    """What scores the answers of a stage: the adapter of a reward model, where it was trained beside the very weights
    the stage starts from, so that both need one copy of them; else a whole model.

    Raises:
        InputError: a stage that makes no reward model, or a model that is not there.
    """
    named, where = settings.train.reward_model, f"stages.{settings.name}.reward_model"
    if named is None:
        return {}
    if named not in stages:
        folder = Path(named)
        if (folder / "adapter_config.json").is_file():
            return {REWARD_ADAPTER: Input(LocalFolder(folder))}
        return {REWARD_MODEL: _named_model(named, where, home)}
    other = stages[named]
    require_rm_stage(other.settings, where)
    methods = {settings.train.finetuning_type, other.settings.train.finetuning_type}
    same = other.trained.inputs["base"].source == start.model.source and not other.settings.train.additional_target
    if same and methods == {"lora"}:
        return {REWARD_ADAPTER: Input(other.trained)}
    return {REWARD_MODEL: Input(other.model)}


def _stage(
    recipe: Recipe,
    settings: StageSettings,
    start: Start,
    reference: Input | None,
    rewards: dict[str, Input],
    reading: dict[str, Any],
    memory: DigestMemory,
) -> StageSteps:
    stage, data, train, base = settings.name, settings.data, settings.train, start.model
    label = f"{recipe.name}-{stage}"
    kind, runtime = STAGES[train.stage], settings.runtime
    fetched = fetch_step(stage, "fetch", settings.sources, data, runtime, kind.shape, train.seed, memory, split=True)
    rendered = render_step(stage, "render", fetched, ROWS, base, data, settings.template)
    tokenized = tokenize_step(stage, "tokenize", rendered, base, data, data.packing, _mixture(settings))
    rows = held_out(settings, fetched, base, memory)
    if train.eval_steps and not rows.watched:
        rule = f"eval_steps measures held-out rows of the stage's own kind ({kind.shape}), and there are none"
        raise InputError(Problem(f"stages.{stage}.eval_steps", rule, "Set val_size or eval_dataset."))
    _require_best(stage, train.metric_for_best_model, list(rows.watched), kind.shape)
    adapter = None if train.create_new_adapter else _adapter(settings)  # a new one: the given one is in the base
    checkpoint = _checkpoint(settings)
    given = (reference, adapter, rows.watched, checkpoint, rewards, reading)
    trained = train_step(label, start.name, base, tokenized, settings, *given)
    adapts = METHODS[train.finetuning_type].makes == "adapter"
    model = merge_step(stage, label, base, Input(trained)) if adapts else trained
    return StageSteps(settings, rendered, tokenized, trained, model, rows)


def _require_best(stage: str, metric: str, sets: list[str], shape: str) -> None:
    """Refuse a best model by what is not measured while training."""
    known = ["eval_loss", *(f"eval_loss/{name}" for name in sets if len(sets) > 1)]
    known += ["eval_rewards/accuracies", "eval_rewards/margins"] if shape == "preference" else []
    if metric not in known:
        where, rule = f"stages.{stage}.metric_for_best_model", f"{metric!r} is not measured while training"
        raise InputError(Problem(where, rule, did_you_mean(metric, known)))


def _mixture(settings: StageSettings) -> dict[str, Any] | None:
    """How the data sets of a stage are mixed; None: every row once, in order."""
    data, sources = settings.data, settings.sources
    repeats = [source.repeat for source in sources]
    if data.mix_strategy == "concat" or len(sources) == 1:
        return {"strategy": "concat", "repeats": repeats} if max(repeats) > 1 else None
    shares = list(data.interleave_probs) or [source.weight for source in sources]
    mixture = {"strategy": data.mix_strategy, "repeats": repeats, "probabilities": shares}
    return mixture | {"seed": settings.train.seed}


def _checkpoint(settings: StageSettings) -> Input | None:
    """The folder that training goes on from; its files count, its path does not."""
    if settings.model.resume_from_checkpoint is None:
        return None
    path, exact = Path(settings.model.resume_from_checkpoint), settings.model.resume == "exact"
    nodes, train = nodes_of_environment(), settings.train.identity()
    mine, where = train["nproc_per_node"], f"stages.{settings.name}.resume_from_checkpoint"
    ranks = range(nodes.rank * mine, (nodes.rank + 1) * mine)
    if settings.runtime.launcher != LOCAL:  # all machines read this one folder
        ranks = range(train.get("nnodes", 1) * mine)
    require_checkpoint(path, {"nnodes": nodes.count} | train, exact, ranks, where)
    return Input(LocalFolder(path), WEIGHT_FILES + (STATE_FILES if exact else ()))


def _adapter(settings: StageSettings) -> Input | None:
    if settings.model.adapter_name_or_path is None:
        return None
    path = Path(settings.model.adapter_name_or_path)
    require_folder(path, "adapter_name_or_path")
    return Input(LocalFolder(path), ("*.safetensors", "*.json"))
