"""What differs between finished runs, and which of their numbers differ by more than chance.

One decision: everything is read from what the runs left, by content. Two models were measured on the same rows when the
digests of the rows agree, whatever data sets are called; then rows are drawn in pairs, and the interval is that of the
difference. Nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.finished_runs import find_run, is_run, run_artifacts
from flows.lineage import Lineage
from flows.named_models import REGISTERED, find_model
from registry.errors import InputError, Problem
from registry.home import Home
from tasks.artifacts import Artifact, Store
from tasks.digests import DigestMemory
from tasks.evaluation import read_answers
from tasks.explain import flatten
from tasks.intervals import LEAST_ROWS, limits
from tasks.jsonlines import read_json_lines
from tasks.measurements import DRAWN, Number, numbers
from tasks.steps import input_digest

ABSENT = None
Measurement = tuple[Artifact, list[str]]
"""What measuring a model made, and the names of its data sets in their order; none: they have numbers."""
NAMES_ONLY = ("sets",)  # of an identity: numbers that say nothing
FIRST_MEASURED = "base"


@dataclass(frozen=True)
class Side:
    """A stage of a finished run."""

    name: str
    """As it was asked for."""
    run: str
    recipe: str
    stage: str
    artifacts: dict[str, Artifact]
    """Step, as in `sft/train`, → what it made: the measurements of the stage, and all that they hang on."""
    evaluations: list[Measurement]
    """What measuring it made."""
    befores: list[Measurement]
    """What measuring the model that the stage started from made; nothing where it was not measured."""

    def model(self) -> Artifact | None:
        """Its weights: the merge, or the training itself where that makes all of them; None where no step made them."""
        key = self.evaluations[0][0].manifest["inputs"]["model"].get("key")
        return next((artifact for artifact in self.artifacts.values() if artifact.key == key), None)

    def curve(self) -> list[dict[str, Any]]:
        """The lines of its training, one for each step that was logged; none where nothing was trained."""
        trained = [artifact for artifact in self.artifacts.values() if artifact.step == "train"]
        path = trained[-1].path / "report" / "metrics.jsonl" if trained else None
        return read_json_lines(path) if path is not None and path.is_file() else []


def find_side(asked: str, home: Home) -> Side:
    """A stage of a run: `RUN`, `RUN:STAGE`, `RECIPE` or `RECIPE:STAGE`; or a model that was measured.

    Args:
        asked: the beginning of a run's id, or a recipe's name, whose newest completed run it is, without a stage the
            last one that was measured; a folder, or `models:/NAME@ALIAS`.
        home: where runs are.

    Raises:
        InputError: no such run or stage, several runs, or one whose artifacts are gone.
    """
    wanted, _, stage = asked.partition(":")
    if not is_run(wanted, home) and (asked.startswith(REGISTERED) or Path(asked).expanduser().is_dir()):
        return _measured_model(asked, home)
    values = find_run(asked, wanted, home)
    measured: dict[str, dict[str, Any]] = values.get("measured", {})
    befores = {each["before"] for each in measured.values()}
    labels = [label for label in measured if label not in befores]
    if (stage and stage not in labels) or not labels:
        rule = f"stage {stage!r} was not measured" if stage else "nothing was measured in this run"
        raise InputError(Problem(asked, rule, f"Measured: {', '.join(labels) or 'nothing'}."))
    stage = stage or labels[-1]
    artifacts = run_artifacts(asked, values, home)

    def made(label: str | None) -> list[Measurement]:
        steps = measured[label]["steps"].items() if label else ()
        return [(artifacts[title], names) for title, names in steps]

    own, before = made(stage), made(measured[stage]["before"])
    titles = {artifact.key: title for title, artifact in artifacts.items()}
    behind = _behind([artifact for artifact, _ in own], titles, Lineage(home))
    return Side(asked, values["id"], values["recipe"], stage, behind, own, before)


def _measured_model(asked: str, home: Home) -> Side:
    """A model by any name it has, with everything that ever measured it.

    Raises:
        InputError: there is no such model, or nothing measured it.
    """
    found, lineage = find_model(asked, home, where=asked), Lineage(home)
    digest = input_digest(found.model, Store(home), DigestMemory(home.digests))
    measured = [a for a in lineage.measurements() if a.manifest["inputs"]["model"]["digest"] == digest]
    measured = [artifact for artifact in measured if DRAWN in artifact.files]
    if not measured:
        rule = "is no completed run, and as a model it was not measured"
        raise InputError(Problem(asked, rule, f"First `llamatuner evaluate {asked}`."))
    own = [(artifact, lineage.set_names(artifact)) for artifact in measured]
    return Side(asked, found.name, found.name, "", _behind(measured, {}, lineage), own, [])


def _behind(last: list[Artifact], titles: dict[str, str], lineage: Lineage) -> dict[str, Artifact]:
    """Step → artifact of some measurements and of all that they hang on, what is needed first.

    Args:
        last: the measurements.
        titles: key → step, where a run tells; else it is stage and kind of step, with its label where those are taken.
        lineage: of the home.
    """
    found: dict[str, Artifact] = {}
    keys: set[str] = set()

    def visit(artifact: Artifact) -> None:
        keys.add(artifact.key)
        for link in lineage.links(artifact):
            behind = lineage.get(link.key)
            if behind is not None and behind.key not in keys:
                visit(behind)
        title = titles.get(artifact.key) or f"{artifact.manifest['stage']}/{artifact.step}"
        found[title if title not in found else f"{title}:{artifact.manifest['label']}"] = artifact

    for artifact in last:
        visit(artifact)
    return found


def differing_settings(sides: Sequence[Side]) -> list[tuple[str, list[Any]]]:
    """Every setting, and every input that no step made, which is not the same on all sides: `sft/train: seed`, values.

    A training that only some sides have is one line. Inputs from other steps are told by those steps.
    """
    facts = [_facts(side) for side in sides]
    rows: list[tuple[str, list[Any]]] = []
    for step in dict.fromkeys(step for found in facts for step in found):
        if all(step in found for found in facts):
            names = dict.fromkeys(name for found in facts for name in found[step])
            rows += [(f"{step}: {name}", [found[step].get(name, ABSENT) for found in facts]) for name in names]
        elif step.endswith("/train"):  # its data and measurements go with it
            rows.append((step, ["there" if step in found else ABSENT for found in facts]))
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _facts(side: Side) -> dict[str, dict[str, Any]]:
    """Step → name → value. A stage alone is one thing whatever it is called, so its steps have no stage in front."""
    alone = len({title.partition("/")[0] for title in side.artifacts} - {FIRST_MEASURED}) == 1
    facts: dict[str, dict[str, Any]] = {}
    for title, artifact in side.artifacts.items():
        stage, _, step = title.partition("/")
        own = facts.setdefault(step if alone and stage != FIRST_MEASURED else title, {})
        own |= {k: v for k, v in flatten(artifact.manifest["identity"]).items() if k not in NAMES_ONLY}
        for name, found in artifact.manifest["inputs"].items():
            if not found.get("artifact"):
                own[name] = f"digest {found['digest'][:12]}"
    return facts


@dataclass(frozen=True)
class Measured:
    """A metric on one data set."""

    metric: str
    rows: int
    results: list[dict[str, Any] | None]
    """Of every side; None where it was not measured on these rows."""
    differences: list[dict[str, Any] | None]
    """To the first side that has it, see `difference`; None for that side, and where there is no number."""


def measured(sides: Sequence[Side]) -> list[Measured]:
    """The numbers of all sides, data set by data set, by the rows they were measured on."""
    found: dict[tuple[str, str], list[Number | None]] = {}
    for place, side in enumerate(sides):
        for artifact, set_names in side.evaluations:
            for number in numbers(artifact, set_names):
                found.setdefault((number.metric, number.rows), [None] * len(sides))[place] = number
    return [_row(row) for row in found.values()]


def _row(row: list[Number | None]) -> Measured:
    first = next(each for each in row if each is not None)
    away = [None if each is None or each is first else difference(each, first) for each in row]
    results = [each and each.result for each in row]
    return Measured(f"{first.metric}.{first.set_name}", first.result["rows"], results, away)


def difference(number: Number, other: Number) -> dict[str, Any]:
    """What a number is more than another on the same rows.

    Returns:
        `value`; `low`, `high` where there are rows enough for an interval; `real`: there is one, and 0 is outside.
    """
    value = number.result["value"] - other.result["value"]
    if number.result["rows"] < LEAST_ROWS:
        return {"value": value, "real": False}
    between = limits(number.drawn - other.drawn)
    return {"value": value, **between, "real": not between["low"] <= 0.0 <= between["high"]}


def answers(sides: Sequence[Side]) -> list[tuple[str, list[str | None]]]:
    """Question → the answer of every side that was asked it."""
    found = [
        {
            row["question"]: row["answer"].strip()
            for artifact, _ in side.evaluations
            if artifact.step == "evaluate"
            for row in read_answers(artifact.path)
        }
        for side in sides
    ]
    questions = dict.fromkeys(question for each in found for question in each)
    return [(question, [each.get(question) for each in found]) for question in questions]
