"""`run` and `prepare`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from flows.cli.output import BAD_INPUT, DONE, FAILED, INTERRUPTED, people, print_json, say_error
from flows.cli.report import print_report
from flows.graph import Pipeline, build, gated
from flows.planning import PlannedStep, plan
from flows.run_records import last_with_keys, records, unclosed
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Store
from tasks.sharing import deliver, tell, undelivered
from tasks.steps import Outcome

Told = Callable[[dict[str, Any]], dict[str, Any]]
"""Answer for programs → the same in the form of the command."""


def run_recipe(
    name: str | Mapping[str, Any],
    overrides: list[str],
    as_json: bool,
    strict_versions: bool,
    data_only: bool = False,
    told: Told = lambda answer: answer,
) -> int:
    """Do what a recipe says and is not done yet; the exit code.

    Args:
        name: of the recipe, its file, or the recipe itself.
        overrides: of its settings.
        as_json: print one object for programs.
        strict_versions: let versions of torch, transformers and their like enter the keys.
        data_only: stop after the data steps.
        told: what the object for programs becomes.
    """
    console = people(as_json)
    recipe = load_recipe(name, overrides)
    for note in recipe.notes:
        console.print(note, markup=False)
    home = Home.open()
    pipeline = build(recipe, home, strict_versions)
    pipeline = pipeline.data_only() if data_only else pipeline
    lines = plan(pipeline, Store(home))
    if _settled(pipeline, lines, home):
        return _up_to_date(pipeline, lines, home, console, told if as_json else None)
    from flows.preflight import preflight, require_rows

    for note in preflight(pipeline, lines, home):
        console.print(note, style="yellow", markup=False)
    require_rows(lines)
    return _run(pipeline, lines, home, console, told if as_json else None)


def _settled(pipeline: Pipeline, lines: list[PlannedStep], home: Home) -> bool:
    """Whether nothing is to be done or cleared: no step, no run that could not be closed, no gate that is undecided."""
    wanted, store = pipeline.results(), Store(home)
    if any(line.key and store.work_folder(line.step.kind, line.key).exists() for line in lines):
        return False  # left by a kill behind the step's end; who finds the step removes it
    if any(line.artifact is None and (not line.made or line.step.title in wanted) for line in lines):
        return False
    if any(unclosed(record) for record in records(home)):
        return False
    if gated(pipeline) is None or not pipeline.recipe.evaluation.gate:
        return True
    record = last_with_keys(home, [line.key for line in lines])
    return bool(record and record.values.get("gate"))


def _up_to_date(pipeline: Pipeline, lines: list[PlannedStep], home: Home, console: Console, told: Told | None) -> int:
    """Everything is there: read manifests, print results, start nothing."""
    _deliver(lines, home, console)
    there = {line.step.title: line.artifact or line.shared for line in lines}
    outcomes = {title: Outcome("cached", artifact, 0.0) for title, artifact in there.items() if artifact}
    record = last_with_keys(home, [line.key for line in lines])
    if told is None:
        for line in lines:
            for why in line.why if line.artifact else ():
                console.print(f"{line.step.title}: {why}", style="yellow", markup=False)
    values = record.values if record else {}
    print_report(console, pipeline, outcomes, home, "up to date: nothing to do", gate=values.get("gate"))
    if told is not None:
        runs = values.get("mlflow_run_id"), values.get("flow_run_id")
        print_json(told(_answer(pipeline, outcomes, "up-to-date", [], *runs, values.get("gate"))))
    return DONE


def _deliver(lines: list[PlannedStep], home: Home, console: Console) -> None:
    """Give the shared store what it has not got from here yet."""
    store = Store(home)
    waiting = [line.artifact for line in lines if line.artifact and undelivered(store, line.artifact)]
    if waiting:
        size = sum(artifact.size for artifact in waiting)
        console.print(f"{len(waiting)} artifacts, {size / 1e6:,.1f} MB, to the shared store", markup=False)
    for artifact in waiting:
        deliver(store, artifact, threading.Event(), lambda event: None)
    tell(store, lambda text: console.print(text, style="yellow", markup=False))


def _answer(
    pipeline: Pipeline,
    outcomes: dict[str, Outcome],
    status: str,
    steps: list[dict[str, Any]],
    mlflow: str | None,
    prefect: str | None,
    gate: dict[str, Any] | None,
) -> dict[str, Any]:
    from flows.session import outcome_json, results_of

    made = steps or [outcome_json(s, outcomes[s.title]) for s in pipeline.steps if s.title in outcomes]
    results = results_of(pipeline, {title: outcome.artifact for title, outcome in outcomes.items()})
    runs = {"mlflow_run_id": mlflow, "flow_run_id": prefect}
    return {"status": status, "steps": made, "results": results, "gate": gate, **runs}


def _run(pipeline: Pipeline, lines: list[PlannedStep], home: Home, console: Console, told: Told | None) -> int:
    from flows.prefect_server import prefect_api
    from flows.runner import import_prefect, run_flow
    from flows.session import Session, stopping
    from flows.view import make_view

    waiting, wanted = sum(not line.made for line in lines), pipeline.results()
    fetched = sum(line.shared is not None and line.step.title in wanted for line in lines)
    more = f", {fetched} to fetch" if fetched else ""
    console.print(f"{pipeline.recipe.name}: {waiting} of {len(lines)} steps to do{more}", style="bold", markup=False)
    view = make_view(console)
    stop = threading.Event()
    try:
        with prefect_api(home, import_prefect), stopping(stop, view.say):
            # until here a signal unwinds: there is nothing to close
            session = Session(pipeline, home, view, stop)
            status = run_flow(session)
    finally:
        view.close()
    print_report(console, pipeline, session.outcomes, home, status, session.failures(), session.gate)
    if told is not None:
        flow_run = session.record.values.get("flow_run_id")
        runs = session.tracker.root, flow_run
        print_json(told(_answer(pipeline, session.outcomes, status, session.steps_json(), *runs, session.gate)))
    errors = session.errors().values()
    if status == "cancelled":
        return INTERRUPTED
    if errors:
        say_error(str(session.error_text()))
        return BAD_INPUT if all(isinstance(error, InputError) for error in errors) else FAILED
    return DONE if status == "completed" else FAILED
