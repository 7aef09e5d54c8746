"""What a recipe's `evaluation` asks for, as steps: held-out data of a stage, and what measures a model on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from flows.named_models import NamedModel
from registry.data_sources import DataSource
from registry.errors import InputError
from registry.recipe import Recipe
from registry.records import DataSettings
from registry.stage_settings import StageSettings
from registry.stages import STAGES
from tasks.benchmark import benchmark_step
from tasks.digests import DigestMemory
from tasks.evaluation import evaluate_step
from tasks.fetch import KEPT_BACK, ROWS, fetch_step
from tasks.generation import generate_step
from tasks.preferences import implicit_reward_step, starts_at_reference
from tasks.render import render_step
from tasks.shards import tokenize_step
from tasks.source_rows import source_list
from tasks.steps import Input, Step
from tasks.win_rate import win_rate_step

ANY = "*"
CHAT, TEXT, PAIRS = "chat", "text", "preference"
QUANT_SETTINGS = ("quant_bit", "quant_type", "double_quantization")


@dataclass(frozen=True)
class Measured:
    """A model that is measured."""

    steps: tuple[Step, ...]
    """What measures it."""
    before: str | None = None
    """Label of the measurement of the model that it was made from."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out data sets, tokenized, by their names."""

    sets: dict[str, Step] = field(default_factory=dict)
    """What is scored."""
    prompts: dict[str, Step] = field(default_factory=dict)
    """Those whose answers are written anew."""
    watched: dict[str, Step] = field(default_factory=dict)
    """What is measured while training."""

    def mapped(self, made: dict[int, Step]) -> HeldOut:
        """The same of other steps, by the ids of these."""
        parts = (self.sets, self.prompts, self.watched)
        return HeldOut(*({name: made.get(id(step), step) for name, step in part.items()} for part in parts))


def held_out(settings: StageSettings, fetched: Step | None, base: Input, memory: DigestMemory) -> HeldOut:
    """The held-out data of a stage, read for one model's tokenizer.

    Args:
        settings: of the stage.
        fetched: its training rows; what `val_size` keeps back of them is the set `validation`.
        base: the model.
        memory: digests of files.
    """
    train, data = settings.train, settings.data
    kind = STAGES[train.stage]
    parts: dict[str, tuple[Step, str]] = {}

    def fetch(source: Any, shape: str, ending: str = "") -> Step:
        given = ((source,), data, settings.runtime, shape, train.seed, memory)
        return fetch_step(settings.name, f"fetch:{source.name}{ending}", *given, split=False)

    if data.val_size and fetched is not None:
        parts["validation"] = (fetched, KEPT_BACK)
    # of prompts there is nothing to measure: the answers that their data sets have are
    wanted = [(source, "chat" if kind.shape == "prompt" else kind.shape) for source in settings.eval_sources]
    if kind.makes_text:  # of what is compared, the likelihood of the good answers is measured
        text = kind.shape == TEXT
        wanted += [(each, TEXT if text else _scored_as(each, settings, memory)) for each in settings.perplexity_sources]
    for source, shape in wanted:
        parts[source.name] = (fetch(source, shape), ROWS)

    def tokenize(
        name: str, step: Step, part: str, ending: str = "", whole: bool = False, data: DataSettings = data
    ) -> Step:
        rendered = render_step(settings.name, f"render:{name}{ending}", step, part, base, data, settings.template)
        name, pairs = f"tokenize:{name}{ending}", step.identity["shape"] == "preference"
        data = uncut if pairs and data.overlong == "truncate" else data
        return tokenize_step(settings.name, name, rendered, base, data, packing=False, whole=whole)

    # an answer begins where its prompt ends, which therefore is not cut; answers that are compared are whole
    uncut = data.model_copy(update={"overlong": "drop"})
    found = HeldOut()
    for name, (step, part) in parts.items():
        text = step.identity["shape"] == "text"
        found.sets[name] = tokenize(name, step, part, whole=text)
        if train.eval_steps and step.identity["shape"] == kind.shape:  # a text of any length would not fit a batch
            found.watched[name] = tokenize(name, step, part, ":watched") if text else found.sets[name]
    for source in settings.generate_sources if kind.makes_text else ():
        step = fetch(source, "prompt", ":prompts")
        found.prompts[source.name] = tokenize(source.name, step, ROWS, ":prompts", data=uncut)
    return found


def _scored_as(source: DataSource, settings: StageSettings, memory: DigestMemory) -> str:
    """What the rows of a set are: plain text is scored whole, pairs by both answers, anything else by its answers."""
    if source.ranking:
        return PAIRS
    if source.formatting == TEXT or set(source.columns) == {"prompt"}:  # an entry of rows that have nothing else
        return TEXT
    if source.remote is not None:  # its rows are known when it has been downloaded
        return CHAT
    refused: list[InputError] = []
    for shape in (CHAT, TEXT):
        given = ((source,), settings.data, settings.runtime, shape, settings.train.seed, memory)
        try:
            form = source_list(fetch_step(settings.name, "fetch", *given, split=False), {}, memory)[0].form()
        except InputError as error:
            refused.append(error)
        else:
            return PAIRS if form.holds == PAIRS else shape
    raise InputError([problem for error in refused for problem in error.problems], "evaluation.perplexity")


def measuring_steps(
    stage: str,
    ending: str,
    label: str,
    model: Input,
    rows: HeldOut,
    recipe: Recipe,
    settings: StageSettings,
    reward: NamedModel | None = None,
    before: Measured | None = None,
) -> tuple[Step, ...]:
    """The steps that measure a model.

    Args:
        stage: where they stand in the plan.
        ending: of their names.
        label: the model's name, for people.
        model: the weights.
        rows: held-out data for the model's tokenizer.
        recipe: what is asked for.
        settings: of the stage whose data they are: template, bf16, batch size.
        reward: the model that scores answers.
        before: what measured the model that it is compared with, on the same rows.
    """
    evaluation, text = recipe.evaluation, STAGES[settings.train.stage].makes_text
    steps: list[Step] = []
    if rows.sets or (evaluation.questions and text):
        measured = evaluate_step(stage, f"evaluate{ending}", label, model, rows.sets, evaluation, settings)
        steps.append(_in_bits(recipe, settings, measured))
        if before is not None and starts_at_reference(settings):
            both = (steps[0], before.steps[0], [*rows.sets])
            found = implicit_reward_step(stage, f"implicit_reward{ending}", label, model, *both)
            steps += [found] if found is not None else []
    size = settings.runtime.per_device_eval_batch_size
    for name, prompts in rows.prompts.items():
        generated = generate_step(
            stage,
            f"generate:{name}{ending}",
            label,
            model,
            prompts,
            name,
            evaluation,
            template=settings.template,
            bf16=settings.train.bf16,
            per_device_eval_batch_size=size,
        )
        generated = _in_bits(recipe, settings, generated)
        steps.append(generated)
        if reward is not None:
            reading = reward.reading or {"bf16": settings.train.bf16}
            scored = (model, generated, _answers_of(before, name), name, reward.model, reading, size)
            steps.append(win_rate_step(stage, f"win_rate:{name}{ending}", label, *scored))
    for benchmark in recipe.benchmarks if text else ():
        asked = benchmark_step(stage, f"benchmark:{benchmark.name}{ending}", label, model, benchmark, settings)
        steps.append(_in_bits(recipe, settings, asked))
    return tuple(steps)


def _answers_of(before: Measured | None, name: str) -> Step | None:
    """What wrote the answers of the model that another is compared with, to the prompts of a data set."""
    found = before.steps if before is not None else ()
    wanted = (step for step in found if step.kind == "generate" and step.runtime["set_names"] == [name])
    return next(wanted, None)


def _in_bits(recipe: Recipe, settings: StageSettings, step: Step) -> Step:
    """A measurement in fewer bits, where that is asked for; of a recipe that trains it says how a model is trained."""
    train = settings.train
    if recipe.evaluates is None or not train.quant_bit:
        return step
    quantised = {key: value for key, value in train.identity().items() if key in QUANT_SETTINGS}
    return replace(step, identity=step.identity | {"quantised": quantised})


def known_metrics(steps: tuple[Step, ...]) -> list[str]:
    """`<metric>.<set>` of everything that steps can measure; `*.<set>` where only the measuring will tell."""
    return [
        f"{metric}.{name}"
        for step in steps
        for name in step.runtime["set_names"]
        for metric in step.runtime["metrics"] or (ANY,)
    ]
