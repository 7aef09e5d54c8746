"""What a recipe's `evaluation` asks for, as steps: held-out data of a stage, and what measures a model on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from registry.recipe import Recipe
from registry.records import DataSettings
from registry.stage_settings import StageSettings
from registry.stages import STAGES
from tasks.benchmark import benchmark_step
from tasks.digests import DigestMemory
from tasks.evaluation import evaluate_step
from tasks.fetch import KEPT_BACK, ROWS, fetch_step
from tasks.generation import generate_step
from tasks.render import render_step
from tasks.shards import tokenize_step
from tasks.steps import Input, Step

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
        general = "text" if kind.shape == "text" else "chat"
        wanted += [(source, settings.shapes.get(source.name, general)) for source in settings.perplexity_sources]
    for source, shape in wanted:
        parts[source.name] = (fetch(source, shape), ROWS)

    def tokenize(
        name: str, step: Step, part: str, ending: str = "", whole: bool = False, data: DataSettings = data
    ) -> Step:
        rendered = render_step(settings.name, f"render:{name}{ending}", step, part, base, data, settings.template)
        name = f"tokenize:{name}{ending}"
        return tokenize_step(settings.name, name, rendered, base, data, packing=False, whole=whole)

    found = HeldOut()
    for name, (step, part) in parts.items():
        text = step.identity["shape"] == "text"
        found.sets[name] = tokenize(name, step, part, whole=text)
        if train.eval_steps and step.identity["shape"] == kind.shape:  # a text of any length would not fit a batch
            found.watched[name] = tokenize(name, step, part, ":watched") if text else found.sets[name]
    # an answer begins where its prompt ends, which therefore is not cut
    uncut = data.model_copy(update={"overlong": "drop"})
    for source in settings.generate_sources if kind.makes_text else ():
        step = fetch(source, "prompt", ":prompts")
        found.prompts[source.name] = tokenize(source.name, step, ROWS, ":prompts", data=uncut)
    return found


def measuring_steps(
    stage: str, ending: str, label: str, model: Input, rows: HeldOut, recipe: Recipe, settings: StageSettings
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
    """
    evaluation, text = recipe.evaluation, STAGES[settings.train.stage].makes_text
    steps: list[Step] = []
    if rows.sets or (evaluation.questions and text):
        steps.append(evaluate_step(stage, f"evaluate{ending}", label, model, rows.sets, evaluation, settings))
    for name, prompts in rows.prompts.items():
        steps.append(
            generate_step(
                stage,
                f"generate:{name}{ending}",
                label,
                model,
                prompts,
                name,
                evaluation,
                template=settings.template,
                bf16=settings.train.bf16,
                per_device_eval_batch_size=settings.runtime.per_device_eval_batch_size,
            )
        )
    for benchmark in recipe.benchmarks if text else ():
        steps.append(benchmark_step(stage, f"benchmark:{benchmark.name}{ending}", label, model, benchmark, settings))
    train = settings.train
    if recipe.evaluates is not None and train.quant_bit:  # else it is how a model is trained
        quantised = {key: value for key, value in train.identity().items() if key in QUANT_SETTINGS}
        return tuple(replace(step, identity=step.identity | {"quantised": quantised}) for step in steps)
    return tuple(steps)


ANY = "*"


def known_metrics(steps: tuple[Step, ...]) -> list[str]:
    """`<metric>.<set>` of everything that steps can measure; `*.<set>` where only the measuring will tell."""
    return [
        f"{metric}.{name}"
        for step in steps
        for name in step.runtime["set_names"]
        for metric in step.runtime["metrics"] or (ANY,)
    ]
