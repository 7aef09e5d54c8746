"""What the keys of a recipe's steps are made of, for tests of what changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.graph import build
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import select
from tasks.digests import DigestMemory
from tasks.steps import LocalFolder
from tests.flows.toy import write_rows
from tests.tiny import tiny_model

Identities = dict[str, Any]


def write_folder(folder: Path) -> Path:
    """Two models, an adapter, a checkpoint and three data files."""
    for seed, name in enumerate(("model", "other_model")):
        tiny_model(folder / name, seed)
    for count, name in enumerate(("train", "held_out", "more"), start=8):
        write_rows(folder / f"{name}.jsonl", count, name)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    write_checkpoint(folder / "checkpoint")
    return folder


def write_checkpoint(folder: Path) -> None:
    """The files of a checkpoint; what is in them is looked at when training begins."""
    folder.mkdir()
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "README.md"):
        (folder / name).write_text(name)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')


def identities(
    folder: Path, stage: dict[str, Any] | None = None, evaluation: dict[str, Any] | None = None
) -> Identities:
    """Step title → all that enters its key from settings and from folders; what other steps make is left out."""
    model = {} if "model_name_or_path" in (stage or {}) else {"model_name_or_path": str(folder / "model")}
    raw = {
        "name": "keys",
        **model,
        "stages": {"sft": {"stage": "sft", "dataset": str(folder / "train.jsonl"), **(stage or {})}},
        "evaluation": {"perplexity": [str(folder / "held_out.jsonl")], "questions": ["who?"], **(evaluation or {})},
    }
    home = Home.open()
    memory = DigestMemory(home.digests)
    found: Identities = {}
    for step in build(load_recipe(raw), home).steps:
        local = {
            name: select(memory.files(wanted.source.path), wanted.part)
            for name, wanted in step.inputs.items()
            if isinstance(wanted.source, LocalFolder)
        }
        found[step.title] = (step.kind, step.identity, local, sorted(step.inputs), step.version, step.packages)
    return found


def changed(before: Identities, after: Identities) -> set[str]:
    """The kinds of steps that differ, came or went."""
    titles = {title for title in before.keys() | after.keys() if before.get(title) != after.get(title)}
    return {(before | after)[title][0] for title in titles}


def placed(value: Any, folder: Path) -> Any:
    """A value of the table with FOLDER replaced."""
    if isinstance(value, list):
        return [placed(item, folder) for item in value]
    return value.replace("FOLDER", str(folder)) if isinstance(value, str) else value
