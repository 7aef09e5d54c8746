"""What a run came to: results before and after, sample answers, where time went, where to look."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.rewards import print_rewards
from flows.graph import Pipeline
from flows.measuring import Measured
from flows.promotion import decision_lines
from flows.session import results_of
from flows.view import duration
from registry.home import Home
from tasks.evaluation import read_answers
from tasks.measurements import by_set
from tasks.servers import MLFLOW, PREFECT, address
from tasks.steps import Outcome
from tasks.tracking import TRACKING_URI
from tasks.training_estimate import memory_sentence


def print_report(
    console: Console,
    pipeline: Pipeline,
    outcomes: dict[str, Outcome],
    home: Home,
    status: str,
    failures: Sequence[str] = (),
    gate: dict[str, Any] | None = None,
) -> None:
    """Everything a person wants to see at the end, in 80 columns; what failed, and what did not run, comes last."""
    console.print()
    _answers(console, pipeline, outcomes)
    _results(console, pipeline, outcomes)
    _memory(console, pipeline, outcomes)
    _times(console, pipeline, outcomes)
    _model(console, pipeline, outcomes)
    print_pages(console, home)
    for told in gate_lines(gate) if gate else ():
        console.print(told)
    for line in failures:
        console.print(Text(line, style="red"))
    console.print(Text(f"{pipeline.recipe.name}: {status}", style="bold"))


def _answers(console: Console, pipeline: Pipeline, outcomes: dict[str, Outcome]) -> None:
    answers = {
        label: found
        for label, each in pipeline.measured.items()
        for step in each.steps
        if step.kind == "evaluate" and step.title in outcomes
        if (found := read_answers(outcomes[step.title].artifact.path))
    }
    befores = pipeline.befores()
    first = next(iter(befores), None)  # what the others start from says the same as the stage that made it
    shown = [name for name in answers if name == first or name not in befores]
    for index, question in enumerate(pipeline.recipe.evaluation.questions if answers else ()):
        console.print(Text(f"Q  {question}", style="bold"))
        for name in shown:
            what, style = ("before", "dim") if name == first else (f"after {name}", "green")
            console.print(Text(f"   {what}: {answers[name][index]['answer'].strip()}", style=style))
        console.print()


def _results(console: Console, pipeline: Pipeline, outcomes: dict[str, Outcome]) -> None:
    results = results_of(pipeline, {title: outcome.artifact for title, outcome in outcomes.items()})
    befores = pipeline.befores()
    for label, values in results.items():
        if label in befores:
            continue
        measured = pipeline.measured.get(label, Measured(()))
        for step in measured.steps:
            if step.identity.get("measure") == "reward" and step.title in outcomes:
                for name, found in by_set(outcomes[step.title].artifact.path, step.runtime["set_names"]).items():
                    print_rewards(console, f"{label}  {name}", found)
                values = {metric: value for metric, value in values.items() if metric.startswith("train.")}
        for metric, found in values.items():
            before = results.get(measured.before or "", {}).get(metric)
            console.print(Text(f"{label}  {metric}: {_value(found, before)}"))
    console.print()


def _value(found: dict[str, Any], before: dict[str, Any] | None) -> str:
    """A number, and the one before."""
    value = found["value"]
    text = f"{value:.6g}"
    if before is not None:
        old = before["value"]
        share = f" ({(value - old) / old:+.0%})" if old > 0 and value >= 0 else ""  # scores have no zero to count from
        text = f"{old:{_form(old)}} before, {value:{_form(value)}} after{share}"
    if "low" in found:
        text += f"; 95 % from {found['low']:.3g} to {found['high']:.3g}, {found['rows']:,} rows"
    elif found.get("rows") == 1:
        text += "; one row, too few for an interval"
    return text


def _form(value: float) -> str:
    """Two digits behind the point, or three that count where that would say little."""
    return ".2f" if abs(value) >= 1 or value == 0 else ".3g"


def _memory(console: Console, pipeline: Pipeline, outcomes: dict[str, Outcome]) -> None:
    """What training took beside what was said before."""
    for name, stage in pipeline.stages.items():
        outcome = outcomes.get(stage.trained.title)
        sentence = memory_sentence(outcome.artifact.path) if outcome else None
        if sentence:
            console.print(Text(f"{name}  {sentence}"))


def _times(console: Console, pipeline: Pipeline, outcomes: dict[str, Outcome]) -> None:
    ran = [(step, outcomes[step.title]) for step in pipeline.steps if step.title in outcomes]
    if not any(outcome.state == "ran" for _, outcome in ran):
        return
    table = Table(box=None, pad_edge=False)
    for name in ("step", "state", "time", ""):
        table.add_column(name, justify="right" if name == "time" else "left", no_wrap=True)
    longest = max(outcome.seconds for _, outcome in ran)
    for step, outcome in ran:
        bar = "#" * round(20 * outcome.seconds / longest) if outcome.state == "ran" else ""
        table.add_row(step.title, outcome.state, duration(outcome.seconds) if outcome.state == "ran" else "", bar)
    console.print(table)
    console.print()


def _model(console: Console, pipeline: Pipeline, outcomes: dict[str, Outcome]) -> None:
    for name, stage in pipeline.stages.items():
        outcome = outcomes.get(stage.model.title)
        if outcome:
            console.print(f"{name} model: {outcome.artifact.path}", markup=False, soft_wrap=True)


def print_pages(console: Console, home: Home) -> None:
    """Where the two pages are, or what opens them; servers of the user's own have addresses already."""
    unseen = []
    for title, variable, name in (("Prefect", "PREFECT_API_URL", PREFECT), ("MLflow", TRACKING_URI, MLFLOW)):
        url = address(home, name)
        if url and not os.environ.get(variable):
            console.print(f"{title} pages: {url.removesuffix('/api')}", markup=False, soft_wrap=True)
        elif not os.environ.get(variable):
            unseen.append(title)
    if unseen:
        console.print(f"Pages of {' and '.join(unseen)}: llamatuner up", markup=False, soft_wrap=True)


def gate_lines(record: dict[str, Any]) -> list[Text]:
    """What a gate came to, for people: a line for each condition, and what was done."""
    *conditions, done = decision_lines(record)
    styles = ["green" if each["met"] else "red" for each in record["conditions"]]
    lines = [Text(line, style=style) for line, style in zip(conditions, styles, strict=True)]
    return [*lines, Text(done, style="bold")]
