"""Which model a name means: a stage of a finished run, a folder, an adapter, a registered version, a hub id."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.finished_runs import find_run, is_run, recipe_name, run_artifacts
from flows.registrations import DIGEST_TAG, version_of
from flows.run_records import records
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.models import DEFAULT_REVISION
from registry.recipes import RECIPES
from tasks.artifacts import BASE_RECORD, WEIGHTS, Artifact, Store
from tasks.jsonlines import read_object
from tasks.model import base_input
from tasks.sharing import brought, known
from tasks.steps import Input, LocalFolder
from tasks.training import MODEL_STEPS, merge_step

REGISTERED = "models:"
KEPT = ("default_system", "enable_thinking", "control_tokens", "template")
"""Of the render step of the stage that made a model: how rows are read for it."""


@dataclass(frozen=True)
class NamedModel:
    """A model, found."""

    model: Input
    name: str
    """For people, and for the folders of artifacts."""
    base: NamedModel | None = None
    """What it was trained from; None where that is not known."""
    reading: dict[str, Any] = field(default_factory=dict)
    """Settings of its stage that decide what its texts look like, and `bf16`; nothing where no stage is known."""


def find_model(asked: str, home: Home, revision: str = DEFAULT_REVISION, where: str = "evaluate") -> NamedModel:
    """The model that a name means.

    Args:
        asked: `RUN`, `RUN:STAGE`, `RECIPE`, `RECIPE:STAGE` of a finished run; a folder with a model, or with a LoRA
            adapter; `models:/NAME@ALIAS`, `models:/NAME/VERSION`; a name of `llamatuner list models` or a hub id.
        home: where runs, artifacts and models are.
        revision: of a hub id.
        where: what named it, for the error.

    Raises:
        InputError: it means nothing.
    """
    if asked.startswith(REGISTERED):
        return _registered(asked, home, where)
    folder = Path(asked).expanduser()
    if folder.is_dir():
        adapter = (folder / "adapter_config.json").is_file()
        return _adapter(folder.absolute(), where, home) if adapter else _base(asked, revision, home, where)
    wanted, _, stage = asked.partition(":")
    if is_run(wanted, home):
        return _of_run(asked, wanted, stage, home)
    name, _ = recipe_name(wanted)
    if name != wanted or name in RECIPES or any(record.values["recipe"] == name for record in records(home)):
        rule = f"no run of the recipe {name} is finished"
        raise InputError(Problem(where, rule, f"First `llamatuner run {wanted}`."))
    return _base(asked, revision, home, where)


def _base(asked: str, revision: str, home: Home, where: str) -> NamedModel:
    try:
        model, name = base_input(asked, revision, home)
    except InputError as error:
        raise InputError([Problem(where, problem.rule, problem.cure) for problem in error.problems]) from error
    return NamedModel(model, name)


def _adapter(folder: Path, where: str, home: Home) -> NamedModel:
    """An adapter merged into its base: the one with the weights it belongs to, else the one that its config names."""
    wanted = read_object(folder / BASE_RECORD).get("base_digest") if (folder / BASE_RECORD).is_file() else None
    base = _with_weights(wanted, home) if wanted else None
    if base is None:
        base = _named_base(folder, where, home)
    setting = where.rpartition(".")[2]  # two adapters of a recipe are two steps
    name = "merge" if setting == "evaluate" else f"merge:{setting}"
    adapter = Input(LocalFolder(folder), ("*.safetensors", "*.json"))
    merged = merge_step("model", folder.name, base.model, adapter, name)
    return NamedModel(Input(merged), folder.name, base)


def _with_weights(digest: str, home: Home) -> NamedModel | None:
    """The model of this home whose weights have a digest."""
    for made in Store(home).all():
        if made.step in MODEL_STEPS and made.part_digest(WEIGHTS) == digest:
            return NamedModel(Input(LocalFolder(made.path)), str(made.manifest["label"]))
    return None


def _named_base(folder: Path, where: str, home: Home) -> NamedModel:
    named = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        rule = f"{folder / 'adapter_config.json'} does not say base_model_name_or_path"
        raise InputError(Problem(where, rule, "Write the base model's folder or hub id there."))
    return _base(str(named), DEFAULT_REVISION, home, f"{where}: base of {folder}")


def _of_run(asked: str, wanted: str, stage: str, home: Home) -> NamedModel:
    """What a stage of a run made; its last stage by default."""
    values = find_run(asked, wanted, home)
    stages = [step["stage"] for step in values["steps"] if step["step"] == "train"]
    if not stages or (stage and stage not in stages):
        rule = f"stage {stage!r} trained nothing in this run" if stage else "nothing was trained in this run"
        raise InputError(Problem(asked, rule, did_you_mean(stage, stages) if stages else "Name a run that trained."))
    stage = stage or stages[-1]
    artifacts = run_artifacts(asked, values, home)
    trained = artifacts[f"{stage}/train"]
    model = artifacts.get(f"{stage}/merge", trained)
    rendered = artifacts[f"{stage}/render"].manifest["identity"]
    reading = {name: rendered[name] for name in KEPT if rendered.get(name) is not None}
    if trained.manifest["identity"]["train"].get("bf16"):
        reading["bf16"] = True
    found = Input(LocalFolder(model.path))
    return NamedModel(found, f"{values['recipe']}-{stage}", _first(trained, home), reading)


def _first(trained: Artifact, home: Home) -> NamedModel | None:
    """The model that the first stage began with; None where its artifact is gone."""
    store, found = Store(home), trained.manifest["inputs"]["base"]
    while "artifact" in found:
        kind, _, folder = found["artifact"].partition("/")
        made = known(store, kind, found["key"])
        if made is None:
            return None
        if "base" not in made.manifest["inputs"]:
            here = brought(store, kind, found["key"])
            return NamedModel(Input(LocalFolder(here.path)), str(here.manifest["label"])) if here else None
        found = made.manifest["inputs"]["base"]
    folder = Path(found["folder"])
    return NamedModel(Input(LocalFolder(folder)), folder.name) if folder.is_dir() else None


def _registered(asked: str, home: Home, where: str) -> NamedModel:
    """A version of MLflow's registry: the artifact of its digest."""
    version = version_of(asked, home)
    digest = version.tags.get(DIGEST_TAG)
    made = next((a for a in Store(home).all() if a.step in ("merge", "train") and a.digest == digest), None)
    if made is None:
        rule = f"{asked} has the digest {digest}, and no artifact of this home has it"
        raise InputError(Problem(where, rule, "Run its recipe again here, or export it there and name the folder."))
    return NamedModel(Input(LocalFolder(made.path)), f"{version.name}-{version.version}", _first(made, home))
