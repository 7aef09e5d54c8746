"""What Prefect's pages show of a run: plan, preview, progress, curve, results."""

from __future__ import annotations

import base64
import re
import time
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.graph import StageSteps
from flows.planning import PlannedStep
from flows.session import Session
from flows.view import details, duration, numbers
from tasks.artifacts import Artifact
from tasks.evaluation import reward_pictures
from tasks.measurements import KINDS
from tasks.number_picture import draw_results
from tasks.preview import marked, read_rendered
from tasks.statistics import statistics_picture
from tasks.steps import Step

PROGRESS_SECONDS = 3.0  # between two updates; each is a write to Prefect's database
PREVIEW_ROWS = 3
FENCE = "`" * 12


def _key(text: str) -> str:
    """Prefect's artifact keys know lowercase letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class ProgressPage:
    """The progress bar of a step."""

    def __init__(self, title: str, flow_run_id: str | None) -> None:
        self._title, self._last, self._shown = title, 0.0, False
        self._id: UUID | None = None

    def wanted(self, event: dict[str, Any]) -> bool:
        """Whether the bar is to be updated from an event: every few seconds, and at the end."""
        if event["kind"] != "progress" or not event.get("total"):
            return False
        now, done = time.monotonic(), event["step"] >= event["total"]
        if done and not self._shown:
            return False  # too short to have a bar
        if now - self._last < PROGRESS_SECONDS and not done:
            return False
        self._last, self._shown = now, True
        return True

    def show(self, event: dict[str, Any]) -> None:
        """Update the bar from a progress event."""
        percent = min(100.0, 100.0 * event["step"] / event["total"])
        text = f"{self._title}: {event['step']} of {event['total']}  {numbers(event)}  {details(event)}"
        if self._id is None:
            created = create_progress_artifact(percent, key=_key(f"{self._title}-progress"), description=text)
            self._id = created if isinstance(created, UUID) else None  # a coroutine only where a loop is running
        else:
            update_progress_artifact(self._id, progress=percent, description=text)


def plan_page(lines: list[PlannedStep]) -> None:
    """The plan as a table."""
    rows = [
        {"step": line.step.title, "state": line.state, "why": "; ".join(line.why), "key": (line.key or "")[:12]}
        for line in lines
    ]
    create_table_artifact(rows, key="plan", description="What would run when this run began, and why")


def step_page(step: Step, artifact: Artifact) -> None:
    """The curves of a training; lengths of rows, and what is trained of them, of a tokenize step; how well a reward
    model does on each data set."""
    for name, title in (("loss", "Training loss"), ("scores", "Scores of the answers, and their KL to the reference")):
        curve = artifact.path / "report" / f"{name}.png"
        if step.kind == "train" and curve.is_file():
            _image(curve.read_bytes(), f"{step.stage}-{name}", title)
    if step.kind == "tokenize":
        _image(statistics_picture(step, artifact), f"{step.title}-statistics", f"{step.title}: lengths of rows")
    pictures = reward_pictures(artifact.path, step.runtime["set_names"]) if step.kind in KINDS else {}
    for number, (name, path) in enumerate(pictures.items()):
        _image(path.read_bytes(), f"{step.title}-rewards-{number}", f"{step.title}: pairs of {name} told apart")


def samples_page(title: str, event: dict[str, Any]) -> None:
    """Some answers of a step with their scores."""
    description = f"{title}: answers drawn in step {event['step']}"
    create_table_artifact(event["rows"], key=_key(f"{title}-samples"), description=description)


def _image(png: bytes, key: str, description: str) -> None:
    data = base64.b64encode(png).decode()
    create_image_artifact(f"data:image/png;base64,{data}", key=_key(key), description=description)


def preview_page(stage: StageSteps, artifact: Artifact) -> None:
    """The first rendered rows, the trained part marked."""
    rows = read_rendered(artifact.path, PREVIEW_ROWS)
    # a fence longer than any run of backticks, so that a row cannot end it
    blocks = [f"row {row['row']}\n\n{FENCE}text\n{marked(row['text'], row['spans'])}\n{FENCE}" for row in rows]
    create_markdown_artifact(
        "\n\n".join(["What stands between ⟦ and ⟧ is trained, the rest is not.", *blocks]),
        key=_key(f"{stage.settings.name}-preview"),
        description="Rendered rows",
    )


def results_page(session: Session) -> None:
    """Results per stage, where time went, what did not run and why, and the MLflow run."""
    results = session.results()
    lines = ["| stage | metric | value | 95 % | rows |", "| --- | --- | --- | --- | --- |"]
    for stage, values in results.items():
        for name, found in values.items():
            limits = f"{found['low']:.4g} to {found['high']:.4g}" if "low" in found else ""
            lines.append(f"| {stage} | {name} | {found['value']:.6g} | {limits} | {found.get('rows', '')} |")
    lines += ["", "| step | state | time |", "| --- | --- | --- |"]
    lines += [f"| {title} | {o.state} | {duration(o.seconds)} |" for title, o in session.outcomes.items()]
    lines += ["", *(f"* {line}" for line in session.failures())]
    if session.gate:
        marks = [f"* {'met' if c['met'] else 'not met'}: `{c['condition']}`" for c in session.gate["conditions"]]
        lines += ["", f"Gate: {'passed' if session.gate['passed'] else 'failed'}", "", *marks]
    lines += [
        "",
        f"MLflow run `{session.tracker.root}`, run record `{session.record.values['id']}`.",
    ]
    create_markdown_artifact("\n".join(lines), key="results", description="Results of this run")
    picture = draw_results(results)
    if picture is not None:
        _image(picture, "numbers", "Numbers with their 95 % intervals")
