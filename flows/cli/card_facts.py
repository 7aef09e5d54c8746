"""What a model came from: the card's facts, read from the graph of the recipe and the manifests of its artifacts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.graph import Pipeline, StageSteps
from flows.planning import plan
from flows.services import without_credentials
from flows.session import TRAINING_RESULTS
from registry.data_sources import DataSource
from registry.deepspeed import zero_stage
from registry.errors import InputError, Problem
from registry.home import Home
from registry.stage_settings import StageSettings
from registry.stages import STAGES
from tasks.artifacts import Artifact, Store
from tasks.base import known_model
from tasks.card import BaseModel, Card, DataSet, Made, Result, StageRecord
from tasks.fetch import KEPT_BACK, ROWS
from tasks.fingerprint import fingerprint
from tasks.measurements import read_results
from tasks.preview import steps_behind
from tasks.sharing import brought
from tasks.steps import Step, upstream
from tasks.train.given import REWARD_ADAPTER, REWARD_MODEL

Artifacts = Mapping[str, Artifact]
"""Step title → its artifact."""
PACKAGES = ("torch", "transformers", "peft")
DATA_SETTINGS = ("cutoff_len", "packing", "train_on_prompt", "mask_history", "default_system", "enable_thinking")
TEMPLATE_FILE = "chat_template.jinja"


def finished(
    pipeline: Pipeline, stage: str, ends: list[Step], recipe: str, home: Home, command: str
) -> dict[str, Artifact]:
    """Step title → artifact of steps of a stage and everything they hang on.

    Args:
        pipeline: of the recipe.
        stage: the one that is meant.
        ends: its steps that are wanted.
        recipe: as it was named.
        home: where it is done.
        command: that needs the model, for the error.

    Raises:
        InputError: something of it is not done.
    """
    needed = {step.title for step in upstream(ends)}
    store = Store(home)
    lines = [line for line in plan(pipeline, store) if line.step.title in needed]
    read = {line.step.title for line in lines if line.step.kind == "fetch"} | pipeline.results()
    found = {
        line.step.title: brought(store, line.step.kind, str(line.key))
        if line.shared and line.step.title in read
        else line.artifact or line.shared
        for line in lines
    }
    missing = [line for line in lines if found[line.step.title] is None]
    if missing:
        first = [f"{line.step.title} ({'; '.join(line.why)})" for line in missing if line.state != "unknown"]
        rest = f", and {len(missing) - len(first)} steps behind" if len(missing) > len(first) else ""
        rule = f"stage {stage} is not done: {', '.join(first)}{rest}"
        raise InputError(Problem(command, rule, f"First run `llamatuner run {recipe}`, with the same --set."))
    return {title: artifact for title, artifact in found.items() if artifact}


def card_of(pipeline: Pipeline, stage: str, artifacts: Artifacts, adapter: bool, saved: str, dtype: str) -> Card:
    """The card of a stage's model.

    Args:
        pipeline: of the recipe.
        stage: the one that is exported.
        artifacts: of every step the stage hangs on, and of what measured it.
        adapter: its adapter alone.
        saved, dtype: of the weights as the artifact has them, and as they are exported.
    """
    chain = list(_chain(pipeline, stage))
    kind = STAGES[chain[-1].settings.train.stage]
    return Card(
        name=f"{pipeline.recipe.name}-{stage}" + ("-adapter" if adapter else ""),
        base=_base(chain[0], artifacts),
        stages=tuple(_stage(steps, artifacts, measured=steps is chain[-1]) for steps in chain),
        results=tuple(_results(pipeline, stage, artifacts)),
        task="text-generation" if kind.makes_text else "text-classification",
        chat=kind.shape != "text",
        adapter=adapter,
        on_base=len(chain) == 1 and not chain[0].settings.train.create_new_adapter and not _added(chain[0]),
        saved_dtype=saved,
        dtype=dtype,
    )


def _chain(pipeline: Pipeline, stage: str) -> Iterator[StageSteps]:
    """The stages a model went through, the first one first."""
    steps = pipeline.stages[stage]
    if steps.settings.model.model is not None:
        yield from _chain(pipeline, steps.settings.model.model)
    yield steps


def _base(first: StageSteps, artifacts: Artifacts) -> BaseModel:
    wanted = first.settings.model.model_name_or_path
    folder = Path(wanted).expanduser().is_dir()
    entry = None if folder else known_model(wanted)
    user, source = first.trained, first.trained.inputs["base"].source
    while isinstance(source, Step) and source.kind == "merge":  # of an adapter that the recipe came with
        user, source = source, source.inputs["base"].source
    found = artifacts[source.title].manifest["counts"] if isinstance(source, Step) else {}
    wheel = f"from the Python package {found['wheel']} ({found['quantisation']})" if found.get("wheel") else ""
    return BaseModel(
        name=str(first.trained.runtime["base_name"]),
        digest=artifacts[user.title].manifest["inputs"]["base"]["digest"],
        hub_id=None if folder else entry.hub_id if entry else wanted,
        licence=entry.licence if entry else None,
        origin=f"commit {found['commit']}" if found.get("commit") else wheel,
    )


def _stage(steps: StageSteps, artifacts: Artifacts, measured: bool) -> StageRecord:
    trained = artifacts[steps.trained.title]
    settings = dict(trained.manifest["identity"]["train"])
    stage, method = settings.pop("stage"), settings.pop("finetuning_type")
    if settings.get("deepspeed"):  # the whole file, which can name folders of a machine
        settings["deepspeed"] = f"ZeRO stage {zero_stage(settings['deepspeed'])}"
    data = steps.settings.data.model_dump(mode="json", include=set(DATA_SETTINGS))
    counts = trained.manifest["counts"]
    made = dict.fromkeys(step.title for step in (steps.trained, steps.model))
    return StageRecord(
        name=steps.settings.name,
        stage=stage,
        method="qlora" if settings.get("quant_bit") else method,
        starts_from=_starts_from(steps, trained),
        made=tuple(Made(artifacts[t].step, artifacts[t].key, artifacts[t].digest) for t in made),
        template=_template(steps.settings, trained),
        settings={"stage": stage, "finetuning_type": method, **settings, **data},
        data=tuple(_data_sets(steps, artifacts, measured)),
        numbers={name: counts[name] for name in TRAINING_RESULTS if name in counts},
        packages={name: trained.manifest["recorded_packages"][name] for name in PACKAGES},
    )


def _added(steps: StageSteps) -> list[str]:
    return [*steps.settings.model.add_tokens, *steps.settings.model.add_special_tokens]


def _starts_from(steps: StageSteps, trained: Artifact) -> str:
    settings, inputs = steps.settings, trained.manifest["inputs"]
    text = settings.model.model or "the base"
    if "adapter" in inputs:
        text += f", going on with the adapter of digest {inputs['adapter']['digest']}"
    elif settings.train.create_new_adapter:
        text += ", with an adapter merged into it first"
    if _added(steps):
        text += f", with the tokens {', '.join(f'`{token}`' for token in _added(steps))} added to it first"
    if "reference" in inputs:
        text += f", compared with the model of digest {inputs['reference']['digest']}"
    for name in (name for name in (REWARD_MODEL, REWARD_ADAPTER) if name in inputs):
        text += f", its answers scored by {settings.train.reward_model} (digest {inputs[name]['digest']})"
    return text


def _template(settings: StageSettings, trained: Artifact) -> str:
    name = settings.data.template
    shown = "the base model's own" if name == "auto" else f"`{Path(name).name}`"
    if TEMPLATE_FILE in trained.files:
        return f"{shown}, sha256 `{trained.files[TEMPLATE_FILE][1]}`"
    text = json.loads((trained.path / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    if not isinstance(text, str):  # none, or several under names
        return shown
    return f"{shown}, sha256 `{hashlib.sha256(text.encode()).hexdigest()}`"


def _data_sets(steps: StageSteps, artifacts: Artifacts, measured: bool) -> Iterator[DataSet]:
    """What was trained on and, where the card has the numbers, what was measured on."""
    settings = steps.settings
    fetched = steps_behind(steps.tokenized)[0]
    yield from _rows(artifacts[fetched.title], ROWS, settings.sources, "trained on")
    known = {source.name: source for source in (*settings.eval_sources, *settings.perplexity_sources)}
    for name, tokenized in steps.held_out.sets.items() if measured else ():
        artifact = artifacts[steps_behind(tokenized)[0].title]
        if name in known:
            yield from _rows(artifact, ROWS, (known[name],), "measured on")
        else:
            yield from _rows(artifact, KEPT_BACK, settings.sources, f"measured on as {name}")


def _rows(artifact: Artifact, part: str, sources: tuple[DataSource, ...], use: str) -> Iterator[DataSet]:
    entries = json.loads((artifact.path / f"{part}.json").read_text(encoding="utf-8"))
    for number, source in enumerate(sources):
        own = [entry for entry in entries if entry["source"] == number]
        yield DataSet(
            name=source.name,
            source=_source(source),
            use=use,
            rows=sum(entry["rows"] for entry in own),
            digest=fingerprint([entry["sha256"] for entry in own]),
            hub_id=source.remote.address if source.remote and source.remote.kind == "hub" else None,
        )


def _source(source: DataSource) -> str:
    if source.remote is None:
        return "files"
    if source.remote.kind == "url":
        return without_credentials(source.remote.address)
    hub = "Hugging Face hub" if source.remote.kind == "hub" else "ModelScope"
    parts = (source.remote.subset, source.remote.split, source.remote.revision)
    return ", ".join([f"{hub}: {source.remote.address}", *filter(None, parts)])


def _results(pipeline: Pipeline, stage: str, artifacts: Artifacts) -> Iterator[Result]:
    own = pipeline.measured.get(stage)
    if own is None:
        return
    befores = _numbers(pipeline.measured[own.before].steps, artifacts) if own.before else {}
    for name, result in _numbers(own.steps, artifacts).items():
        before = befores[name]["value"] if name in befores else None
        limits = (result["low"], result["high"]) if "low" in result else None
        yield Result(name, result["rows"], result["value"], before, limits)


def _numbers(steps: tuple[Step, ...], artifacts: Artifacts) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for step in steps:
        found |= read_results(artifacts[step.title].path, step.runtime["set_names"])
    return found
