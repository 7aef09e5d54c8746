"""Finished runs by name, and what they made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flows.run_records import records
from registry.core import read_text, read_yaml
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.loading import SUFFIXES
from tasks.artifacts import Artifact, Store
from tasks.sharing import brought, known
from tasks.steps import DATA_STEPS


def is_run(wanted: str, home: Home) -> bool:
    """Whether a completed run's id begins so, or its recipe is called so."""
    name, _ = recipe_name(wanted)
    return any(values["id"].startswith(wanted) or values["recipe"] == name for values in _completed(home))


def recipe_name(wanted: str) -> tuple[str, int]:
    """A recipe's name, also of a recipe's file, and how many of its runs back.

    >>> recipe_name("demo"), recipe_name("demo~2")
    (('demo', 0), ('demo', 2))
    """
    found = re.fullmatch(r"(.+)~([0-9]{1,6})", wanted)
    name, ago = (found[1], int(found[2])) if found else (wanted, 0)
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES and path.is_file():
        raw = read_yaml(read_text(path), name)
        name = str(raw.get("name", path.stem)) if isinstance(raw, dict) else name
    return name, ago


def _completed(home: Home) -> list[dict[str, Any]]:
    return [record.values for record in records(home) if record.values["status"] == "completed"]


def find_run(asked: str, wanted: str, home: Home) -> dict[str, Any]:
    """The record of a completed run.

    Args:
        asked: for the error.
        wanted: the beginning of its id, or a recipe's name or file, whose newest completed run it is; with `~1` the one
            before.
        home: where runs are.

    Raises:
        InputError: no such run, or several.
    """
    known = _completed(home)
    found = [values for values in known if values["id"].startswith(wanted)]
    name, ago = recipe_name(wanted)
    own = [values for values in known if values["recipe"] == name]
    found = found or own[ago : ago + 1]
    if len(found) != 1:
        rule = f"{len(found)} completed runs begin with {wanted!r}" if found else "no completed run has that name"
        rule = f"{name} has {len(own)} completed runs" if own and not found else rule
        names = list(dict.fromkeys(name for values in known for name in (values["recipe"], values["id"])))
        raise InputError(Problem(asked, rule, f"{did_you_mean(wanted, names)} See `llamatuner runs`.".strip()))
    return found[0]


def run_artifacts(asked: str, values: dict[str, Any], home: Home) -> dict[str, Artifact]:
    """Step → what it made, of a whole run; what data steps made may be in the shared store only."""
    store, artifacts = Store(home), dict[str, Artifact]()
    for step in values["steps"]:
        title = f"{step['stage']}/{step['step']}"
        kind = step["step"].partition(":")[0]
        artifact = (known if kind in DATA_STEPS else brought)(store, kind, step["key"])
        if artifact is None:
            raise InputError(Problem(asked, f"what {title} made is gone or damaged", "Run the recipe again."))
        artifacts[title] = artifact
    return artifacts
