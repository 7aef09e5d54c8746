"""Finished runs by name, and what they made."""

from __future__ import annotations

from typing import Any

from flows.run_records import records
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from tasks.artifacts import Artifact, Store
from tasks.sharing import brought, known
from tasks.steps import DATA_STEPS


def is_run(wanted: str, home: Home) -> bool:
    """Whether a completed run's id begins so, or its recipe is called so."""
    return any(values["id"].startswith(wanted) or values["recipe"] == wanted for values in _completed(home))


def _completed(home: Home) -> list[dict[str, Any]]:
    return [record.values for record in records(home) if record.values["status"] == "completed"]


def find_run(asked: str, wanted: str, home: Home) -> dict[str, Any]:
    """The record of a completed run.

    Args:
        asked: for the error.
        wanted: the beginning of its id, or a recipe's name, whose newest completed run it is.
        home: where runs are.

    Raises:
        InputError: no such run, or several.
    """
    known = _completed(home)
    found = [values for values in known if values["id"].startswith(wanted)]
    found = found or [values for values in known if values["recipe"] == wanted][:1]
    if len(found) != 1:
        rule = f"{len(found)} completed runs begin with {wanted!r}" if found else "no completed run has that name"
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
