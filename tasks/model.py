"""model: the base model as an artifact, or a local folder as it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.home import Home
from registry.models import MODELS
from tasks.base import fetch_base, locate, locate_folder
from tasks.steps import Input, LocalFolder, Step, Work

VERSION = 1  # first form


def base_input(model_name_or_path: str, revision: str, home: Home) -> tuple[Input, str]:
    """What a stage starts from, and its name for people. Asks no network.

    A model that has to be fetched is known by hub id and revision: once fetched it stays what it is, also when the
    hub's branch moves on, until its artifact is removed.

    Raises:
        InputError: a folder that is not a model, or a name that can mean nothing.
    """
    local = locate_folder(model_name_or_path, home)
    if local is not None and local.path is not None:
        return Input(LocalFolder(local.path)), local.name
    hub_id = MODELS[model_name_or_path].hub_id if model_name_or_path in MODELS else model_name_or_path
    step = Step(
        stage="base",
        name="model",
        version=VERSION,
        label=hub_id.split("/")[-1],
        identity={"hub_id": hub_id, "revision": revision},
        inputs={},
        run="tasks.model:fetch_model",
        runtime={"model_name_or_path": model_name_or_path},
    )
    return Input(step), model_name_or_path


def fetch_model(work: Work) -> dict[str, Any]:
    """Find the model and download it; returns where it came from."""
    located = locate(work.step.runtime["model_name_or_path"], work.identity["revision"], work.home)
    if located.path is not None:
        raise RuntimeError(f"{located.path} appeared while the pipeline ran; run it again")
    source = fetch_base(located, work.output, work.scratch, work.note, work.stop)
    work.note(f"base model from {', '.join(f'{name} {value}' for name, value in source.items() if value)}")
    return source


def quantised_reason(folder: Path) -> tuple[str, str] | None:
    """Why a model folder cannot be trained on: the rule and the cure; None when its weights are not quantised."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
    return (
        f"the base model's weights are quantised ({method}): an adapter trained on them cannot be merged, and they "
        "cannot be moved",
        "Use the model as it was before, and quant_bit to hold it in fewer bits while training.",
    )


def longest_sequence(folder: Path) -> int | None:
    """Most tokens that a model can see; None where its config does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return int(found) if found else None
