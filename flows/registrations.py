"""Where models are known outside the store: versions of MLflow's registry, and the runs that made or used them."""

from __future__ import annotations

import json
from typing import Any

from flows.run_records import records
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from tasks.tracking import TRACKING_URI, is_tracked, mlflow_client

ALIAS = "champion"
DIGEST_TAG, HISTORY_TAG, GATE_TAG = "llamatuner.digest", "llamatuner.champions", "llamatuner.gate"
NOW, BEFORE = "now", "before"
Version = dict[str, Any]
"""`name`, `version`, `champion` (`now`, `before` or None) and `gate` (`passed`, `failed` or None)."""


def registrations(home: Home) -> tuple[dict[str, list[Version]], str | None]:
    """Content digest → the versions registered under it, and why they are not known, if they are not.

    Args:
        home: whose registry is asked; nothing is asked where nothing was ever registered.
    """
    if not is_tracked(home):
        return {}, None
    client = mlflow_client(home)
    from mlflow.exceptions import MlflowException

    found: dict[str, list[Version]] = {}
    try:
        for model in _all(client.search_registered_models):
            before = json.loads(model.tags.get(HISTORY_TAG, "[]"))
            for version in _all(client.search_model_versions, f"name='{model.name}'"):
                number, gate = str(version.version), version.tags.get(GATE_TAG)
                was = number in before or gate == "passed"  # what passes becomes the champion
                champion = NOW if str(model.aliases.get(ALIAS)) == number else BEFORE if was else None
                entry = {"name": model.name, "version": number, "champion": champion, "gate": gate}
                found.setdefault(version.tags.get(DIGEST_TAG, ""), []).append(entry)
    except MlflowException as error:
        return {}, f"MLflow's registry cannot be read: {next(iter(str(error).splitlines()), '')}"
    return found, None


def _all(search: Any, *arguments: str) -> list[Any]:
    """Every page of a search."""
    found, token = list[Any](), None
    while True:
        page = search(*arguments, page_token=token)
        found, token = [*found, *page], page.token
        if not token:
            return found


def version_of(uri: str, home: Home) -> Any:
    """The registered version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names.

    Raises:
        InputError: it is not there, or the registry cannot be asked.
    """
    rest = uri.removeprefix("models:/")
    name, at, alias = rest.partition("@")
    name, _, number = (name, "", "") if at else rest.rpartition("/")
    if not name or not (alias or number):
        cure = "E.g. models:/NAME@champion or models:/NAME/3."
        raise InputError(Problem(uri, "is no address of a registered model", cure))
    if not is_tracked(home):
        cure = f"Set LLAMATUNER_HOME or {TRACKING_URI}."
        raise InputError(Problem(uri, f"nothing is registered in {home.path}", cure))
    client = mlflow_client(home)
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, number)
    except MlflowException as error:
        rule = next(iter(str(error).splitlines()), "")
        try:
            known = [model.name for model in _all(client.search_registered_models)]
        except MlflowException:
            known = []
        cure = "" if name in known else did_you_mean(name, known)
        raise InputError(Problem(uri, rule, cure)) from error


def runs_with(keys: set[str], home: Home) -> list[dict[str, Any]]:
    """The runs that made or used artifacts, newest first: `id`, `recipe`, `stage`, `status`, `made` (or used).

    Args:
        keys: of the artifacts.
        home: where runs are.
    """
    found = []
    for record in records(home):
        values = record.values
        steps = [step for step in values.get("steps", []) if step["key"] in keys]
        if steps:
            made = any(step["state"] == "ran" for step in steps)
            own = {name: values[name] for name in ("id", "recipe", "status")}
            found.append(own | {"stage": steps[-1]["stage"], "made": made})
    return found
