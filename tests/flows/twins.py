"""Tiny twins of the shipped recipes: the same stages, steps and data sets, small enough to be run by tests.

One decision: a twin is no file of its own but the recipe with `TINY` over every stage, so that it cannot fall behind
the recipe; and its programs do their work in this process, for what takes long about them is to import libraries.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from registry.core import read_text, read_yaml
from registry.recipes import RECIPES
from tasks.launch import LOCAL, ProgramFailed
from tasks.launchers.job import Launcher
from tasks.launchers.local import Local
from tasks.locks import check_stop
from tasks.nodes import Nodes
from tasks.program import Events, Spec, classify

TINY = {
    "max_samples": 8,  # rows of each data set, the first ones of those that ship
    "max_steps": 3,  # in the first step of a warm-up the learning rate is 0
    "lora_rank": 2,
    "cutoff_len": 512,  # tokens, which are bytes to the tiny tokenizer
}
TINY_EVALUATION = {"max_new_tokens": 4}


def twin(name: str, model: Path) -> dict[str, Any]:
    """The tiny twin of a shipped recipe, on the tiny model in a folder (`tests.tiny.tiny_model`)."""
    raw = read_yaml(read_text(RECIPES[name]), name)
    # some defaults are written for all stages at once
    common = {key: value for key, value in raw.items() if key not in TINY}
    stages = {stage: settings | TINY for stage, settings in raw["stages"].items()}
    evaluation = raw["evaluation"] | TINY_EVALUATION
    return common | {"model_name_or_path": str(model), "stages": stages, "evaluation": evaluation}


def write_twin(raw: dict[str, Any], folder: Path) -> str:
    """Write a recipe into a folder; its path."""
    path = folder / f"{raw['name']}.json"
    path.write_text(json.dumps(raw))
    return str(path)


def work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs do their work in this process and thread; to launch them is tested elsewhere."""
    monkeypatch.setattr("tasks.steps.run_program", _run_here)


def _run_here(
    module: str,
    spec: Spec,
    folder: Path,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event | None = None,
    processes: int = 1,
    nodes: Nodes | None = None,
    launcher: Launcher = LOCAL,
) -> None:
    """What `tasks.launch.run_program` does, without a process."""
    assert (processes, nodes) == (1, None)
    assert isinstance(launcher, Local)
    with suppress(FileNotFoundError):
        Path(spec.events).unlink()
    check_stop(stop)
    events = Events(spec.events)
    try:
        with open(folder / "program.log", "a") as log, redirect_stdout(log):
            import_module(module).work(Spec(**json.loads(json.dumps(asdict(spec)))), events)
    except Exception as error:
        raise ProgramFailed(*classify(error)) from error
    finally:
        for line in Path(spec.events).read_text().splitlines():
            on_event(json.loads(line))
