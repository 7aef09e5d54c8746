"""Gate and champion: whether a model is good enough, and which one is the model that others use.

One decision: a gate reads what was measured, by content. The champion's numbers are those of an evaluation of its very
weights on the very same rows, whichever run made it; without one the condition is not met, and that is said. The
champion is an alias of MLflow's registry, which moves in one step; who was champion before is kept beside it, so a
promotion can be taken back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from flows.comparison import Measurement, Side, difference
from flows.registrations import ALIAS, DIGEST_TAG, GATE_TAG, HISTORY_TAG
from flows.run_records import records
from registry.errors import InputError, Problem, did_you_mean
from registry.gates import BASE, CHAMPION, Condition
from registry.home import Home
from tasks.artifacts import Store
from tasks.locks import locked
from tasks.measurements import DRAWN, KINDS, Number, numbers
from tasks.tracking import mlflow_client


@dataclass(frozen=True)
class Checked:
    """A condition, and the numbers it was decided with."""

    condition: str
    met: bool
    value: float | None = None
    low: float | None = None
    high: float | None = None
    """Of the metric, or of its difference to the other model; None where there is none."""
    reason: str = ""
    """Why it is met or not, where no number says it."""


@dataclass(frozen=True)
class Registered:
    """A registered model, and the version that is the champion."""

    name: str
    version: str
    """The candidate's."""
    run_id: str
    digest: str
    """Of the candidate's weights."""
    champion: str | None
    champion_digest: str | None


def find_registered(side: Side, client: Any) -> Registered:
    """The candidate in MLflow's registry.

    Raises:
        InputError: it was not registered.
    """
    from mlflow.exceptions import MlflowException

    name, model = f"{side.recipe}-{side.stage}", side.model()
    if model is None or model.manifest["stage"] != side.stage:
        rule = "measures a model, and what is promoted is a stage of a run that trained it"
        raise InputError(Problem(side.name, rule, "Name that run or recipe."))
    try:
        aliases = client.get_registered_model(name).aliases
        versions = {str(each.version): each for each in client.search_model_versions(f"name='{name}'")}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        aliases, versions = {}, {}
    own = next((each for each in versions.values() if each.tags.get(DIGEST_TAG) == model.digest), None)
    if own is None:
        rule = f"its model is not registered in MLflow as {name}"
        raise InputError(Problem(side.name, rule, "Run the recipe again with MLflow at hand; what is done is kept."))
    champion = str(aliases[ALIAS]) if ALIAS in aliases else None
    digest = versions[champion].tags.get(DIGEST_TAG) if champion in versions else None
    return Registered(name, str(own.version), own.run_id, model.digest, champion, digest)


def check_gate(side: Side, conditions: Sequence[Condition], champion: str | None, home: Home) -> list[Checked]:
    """Every condition, decided.

    Args:
        side: the candidate.
        conditions: of the gate.
        champion: digest of the champion's weights; None: there is none.
        home: where measurements are.

    Raises:
        InputError: a metric that the candidate was not measured by.
    """
    own = {f"{each.metric}.{each.set_name}": each for each in _numbers(side.evaluations)}
    unknown = [each for each in conditions if each.metric not in own]
    if unknown:
        raise InputError(
            [
                Problem("gate", f"{each.text!r}: {each.metric} was not measured", did_you_mean(each.metric, [*own]))
                for each in unknown
            ]
        )
    others: dict[str, list[Measurement]] = {
        BASE: side.befores,
        CHAMPION: _measured(champion, home) if champion else [],
    }
    found = []
    for each in conditions:
        number = own[each.metric]
        if each.other == CHAMPION and champion is None:
            found.append(Checked(each.text, True, reason="there is no champion yet"))
        elif each.other is None:
            found.append(_decided(each, number.result))
        else:
            found.append(_against(each, number, others[each.other]))
    return found


def _against(each: Condition, number: Number, others: Sequence[Measurement]) -> Checked:
    wanted = (number.metric, number.rows)
    other = next((found for found in _numbers(others) if (found.metric, found.rows) == wanted), None)
    if other is None:
        reason = f"the {each.other} was not measured on these rows; run its recipe with this data set"
        return Checked(each.text, False, reason=reason)
    return _decided(each, difference(number, other))


def _decided(each: Condition, found: dict[str, Any]) -> Checked:
    value, low, high = (found.get(name) for name in ("value", "low", "high"))
    if low is None or high is None:
        if each.sure:
            return Checked(each.text, False, value, reason="one row is too few for an interval")
        return Checked(each.text, each.holds(found["value"], found["value"], found["value"]), value)
    return Checked(each.text, each.holds(found["value"], low, high), value, low, high)


def _numbers(evaluations: Sequence[Measurement]) -> Iterator[Number]:
    """Everything that was measured."""
    for artifact, names in evaluations:
        yield from numbers(artifact, names)


def _measured(digest: str, home: Home) -> list[Measurement]:
    """Everything that measured these weights."""
    return [
        (artifact, [])
        for artifact in Store(home).all()
        if artifact.step in KINDS
        and DRAWN in artifact.files
        and artifact.manifest["inputs"]["model"]["digest"] == digest
    ]


def promote(side: Side, conditions: Sequence[Condition], home: Home) -> dict[str, Any]:
    """Check the gate and, when every condition is met, make the model the champion; all that was decided with.

    Raises:
        InputError: see `check_gate` and `find_registered`.
    """
    client = mlflow_client(home)
    with locked(home.locks / "promote.lock"):  # two at once: the second one meets the first one's champion
        found = find_registered(side, client)
        checked = check_gate(side, conditions, found.champion_digest, home)
        passed = all(each.met for each in checked)
        record = {
            "model": found.name,
            "version": found.version,
            "digest": found.digest,
            "run": side.run,
            "stage": side.stage,
            "champion_before": found.champion,
            "champion_digest_before": found.champion_digest,
            "passed": passed,
            "conditions": [asdict(each) for each in checked],
            "decided": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        client.log_dict(found.run_id, record, "gate.json")
        client.set_model_version_tag(found.name, found.version, GATE_TAG, "passed" if passed else "failed")
        if passed and found.champion != found.version:
            history = _history(client, found.name)
            client.set_registered_model_alias(found.name, ALIAS, found.version)
            if found.champion is not None:
                history.append(found.champion)
            client.set_registered_model_tag(found.name, HISTORY_TAG, json.dumps(history))
        if passed:  # so that what it was made from is kept
            next(each for each in records(home) if each.values["id"] == side.run).update(promoted=True)
    return record


def decision_lines(record: dict[str, Any]) -> list[str]:
    """What a gate came to: a line for each condition, and what was done."""
    lines = []
    for each in record["conditions"]:
        parts = [f"{each['value']:.4g}"] if each["value"] is not None else []
        parts += [f"95 % from {each['low']:.4g} to {each['high']:.4g}"] if each["low"] is not None else []
        parts += [each["reason"]] if each["reason"] else []
        lines.append(f"{'met' if each['met'] else 'not met':<8} {each['condition']}: {', '.join(parts)}")
    name = f"{record['model']} version {record['version']}"
    text = f"Failed gate: {name} was not promoted; nothing was moved"
    if record["passed"]:
        before = record["champion_before"]
        instead = f", instead of version {before}" if before not in (None, record["version"]) else ""
        text = f"{name} is the champion{instead}"
    return [*lines, text]


def roll_back(name: str, home: Home) -> dict[str, Any]:
    """Make the champion before the present one champion again.

    Raises:
        InputError: no such model, or nobody was champion before.
    """
    from mlflow.exceptions import MlflowException

    client = mlflow_client(home)
    with locked(home.locks / "promote.lock"):
        try:
            present = client.get_registered_model(name).aliases.get(ALIAS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = [each.name for each in client.search_registered_models()]
            raise InputError(Problem(name, "no model of that name is registered", did_you_mean(name, known))) from error
        history = _history(client, name)
        if present is None or not history:
            raise InputError(Problem(name, "there was no champion before", "Promote a model first."))
        *rest, version = history
        client.set_registered_model_alias(name, ALIAS, version)
        client.set_registered_model_tag(name, HISTORY_TAG, json.dumps(rest))
    return {"model": name, "version": version, "instead_of": str(present)}


def _history(client: Any, name: str) -> list[str]:
    found: list[str] = json.loads(client.get_registered_model(name).tags.get(HISTORY_TAG, "[]"))
    return found
