"""`sweep`: trials of a recipe, on a terminal, as JSON, and the best one as a recipe."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from flows.cli.output import BAD_INPUT, DONE, FAILED, INTERRUPTED, people, print_json, say_error
from flows.cli.sweep_report import print_sweep
from flows.graph import build
from flows.run_records import RunRecord
from flows.sweep_plan import SweepPlan, plan_sweep, shared, with_values
from flows.sweep_results import SweepResults, as_json, sweep_results
from flows.sweep_study import COMPLETE, Study, Trial, sweep_folder
from flows.sweep_study import FAILED as FAILED_TRIAL
from flows.sweeping import Teller, plan_of, run_trials, values_text
from registry.errors import InputError, Problem
from registry.gates import condition
from registry.home import Home
from registry.recipe_paths import absolute_paths
from registry.sweeps import read_sweep
from tasks.locks import Interrupted, locked

BEST = "best.yaml"
ENDED = "ended"  # with the sweep: the record of the command that came to its end
DRAWN = 10  # first trials of tpe, which nothing is known for yet


def sweep_recipe(
    recipe: str, file: str, overrides: list[str], out: Path | None, promote: bool, as_json_line: bool
) -> int:
    """Do the trials that are not done yet; the exit code: 1 when one failed.

    Args:
        recipe: name or file.
        file: the sweep.
        overrides: of the recipe's settings.
        out: new file for the recipe with the best values.
        promote: make the best model the champion, if it passes the recipe's gate.
        as_json_line: print one object for programs.

    Raises:
        InputError: everything wrong with the two files, the data and this machine, before anything runs.
    """
    console, home, plan = _planned(recipe, file, overrides, as_json_line)
    _require(plan, out, promote)
    folder, stop = sweep_folder(home, plan.name), threading.Event()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    from flows.session import stopping

    try:
        with stopping(stop, say), locked(home.locks / f"sweep-{plan.name}.lock", stop, say):
            status, results, run_id = _sweep(plan, home, folder, console, stop, say)
    except Interrupted:
        return INTERRUPTED
    done = status == "completed"  # else the same command would find its file there, and refuse to write it
    written = _write_best(plan, results, folder, out if done else None)
    print_sweep(console, plan, results, home, folder, written)
    gate = _promoted(plan, results, home, console) if promote and done else None
    code = _code(status, results, gate)
    if as_json_line:
        states = {DONE: "completed", INTERRUPTED: "cancelled"}
        more = {"folder": str(folder), "recipe": str(written) if written else None, "gate": gate}
        known = {"status": states.get(code, "failed")} | as_json(plan, results)
        print_json(known | more | {"mlflow_run_id": run_id})
    if status == "cancelled":
        console.print("stopped; the same command goes on with it", style="bold")
    elif status != "completed":
        say_error(f"{status}\nWhat is finished is kept; the same command goes on with it.")
    return code


def _planned(recipe: str, file: str, overrides: list[str], as_json_line: bool) -> tuple[Console, Home, SweepPlan]:
    console, sweep, home = people(as_json_line), read_sweep(file), Home.open()
    plan = plan_sweep(recipe, overrides, sweep, home, Path(file).name)
    for note in (*plan.recipe.notes, *plan.notes):
        console.print(note, style="yellow", markup=False)
    return console, home, plan


def _require(plan: SweepPlan, out: Path | None, promote: bool) -> None:
    problems = []
    if out is not None and out.exists():
        problems.append(Problem(f"--out {out}", "is there; nothing is written over", "Name a new file."))
    if out is not None and not out.absolute().parent.is_dir():
        problems.append(Problem(f"--out {out}", "its folder does not exist", "Name another."))
    if promote and not plan.recipe.evaluation.gate:
        rule = "the recipe has no gate that says when a model is good enough"
        problems.append(Problem("--promote", rule, "Set evaluation.gate, or promote the best run afterwards."))
    if problems:
        raise InputError(problems)


def _sweep(
    plan: SweepPlan, home: Home, folder: Path, console: Console, stop: threading.Event, say: Any
) -> tuple[str, SweepResults, str | None]:
    """Do the trials; how it ended, what they came to, and the sweep's run in MLflow."""
    from flows.prefect_server import prefect_api
    from flows.runner import flush_events, import_prefect
    from flows.sweep_record import PARENT, SweepRun, sweep_page
    from flows.view import MadeView, make_view

    study = Study(plan, folder)
    done = len(_ended(study.trials()))
    target = f"{plan.target.direction} {plan.target.metric} of {plan.target.label}"
    say(f"sweep {plan.name}: {target}; {done} of {plan.count} trials done")
    if done >= plan.count and study.kept(ENDED):
        return "completed", sweep_results(plan, study, home), study.kept(PARENT)
    record = RunRecord.start(home, f"{plan.recipe.name} (sweep)")  # by which the next run notices that this one died
    run = SweepRun(home, say)
    parent = run.begin(plan, study, record)
    record.update(sweep=plan.name, mlflow_run_id=parent)
    with prefect_api(home, import_prefect):
        status = run_trials(plan, study, home, Teller(lambda: MadeView(make_view(console)), say), stop, parent)
        results = sweep_results(plan, study, home)
        sweep_page(plan, results)
        flush_events()
    ended = status if status in ("completed", "cancelled") else "failed"
    states = {"completed": "FINISHED", "cancelled": "KILLED"}
    run.end(plan, results, _pictures(results, plan, folder), states.get(ended, "FAILED"))
    counts = {"done": len(_ended(results.trials)), "of": plan.count}
    record.end(ended, trials=counts, kept=_keys(plan, results, home))
    study.keep(**{ENDED: record.values["id"] if ended == "completed" else None})
    return status, results, parent


def _ended(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state in (COMPLETE, FAILED_TRIAL)]


def _pictures(results: SweepResults, plan: SweepPlan, folder: Path) -> dict[str, bytes]:
    """Draw and keep them; nothing where no trial came to a number."""
    from flows.sweep_picture import draw_importances, draw_trials

    pictures: dict[str, bytes] = {}
    if results.best is not None:
        pictures["parallel_coordinates.png"] = draw_trials(plan, results.trials, results.best)
    if results.importances:
        count = sum(trial.value is not None for trial in results.trials)
        pictures["importance.png"] = draw_importances(results.importances, count)
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    return pictures


def _keys(plan: SweepPlan, results: SweepResults, home: Home) -> list[str | None]:
    """Of all that the best trial is made of: `artifacts gc` keeps it."""
    if results.best is None:
        return []
    return [line.key for line in plan_of(build(plan.trial(results.best.values), home), home)]


def _write_best(plan: SweepPlan, results: SweepResults, folder: Path, out: Path | None) -> Path | None:
    """The recipe with the best values, in the sweep's folder and where it is wanted; the file to name to people."""
    best = results.best
    if best is None:
        return None
    raw = {"name": plan.recipe.name, **with_values(plan.raw, best.values)}
    lines = [f"# {plan.recipe.name} with the best values of sweep {plan.name}: trial {best.number} of {plan.count}."]
    lines += [f"# {plan.target.metric} {best.value:.6g}; {values_text(best.values)}"]

    def write(path: Path) -> Path:
        beside = path.absolute().parent == plan.folder  # elsewhere its relative paths would mean others
        text = yaml.safe_dump(raw if beside else absolute_paths(raw, plan.folder), sort_keys=False, allow_unicode=True)
        path.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")
        return path

    kept = write(folder / BEST)
    return write(out) if out is not None else kept


def _promoted(plan: SweepPlan, results: SweepResults, home: Home, console: Console) -> dict[str, Any] | None:
    """Put the best model through the recipe's gate."""
    from flows.cli.report import gate_lines
    from flows.comparison import find_side
    from flows.promotion import promote

    if results.best is None:
        return None
    side = find_side(f"{results.best.outcome['run']}:{plan.target.label}", home)
    record = promote(side, [condition(text) for text in plan.recipe.evaluation.gate], home)
    for line in gate_lines(record):
        console.print(line)
    return record


def _code(status: str, results: SweepResults, gate: dict[str, Any] | None) -> int:
    if status == "cancelled":
        return INTERRUPTED
    failed = [trial for trial in results.trials if trial.state == FAILED_TRIAL]
    if failed and results.best is None and all(trial.outcome.get("bad_input") for trial in failed):
        return BAD_INPUT
    if status != "completed" or failed or (gate is not None and not gate["passed"]):
        return FAILED
    return DONE


def show_sweep(recipe: str, file: str, overrides: list[str], as_json_line: bool) -> None:
    """Show the trials, as far as they do not depend on one another, and what they share. Runs nothing."""
    console, home, plan = _planned(recipe, file, overrides, as_json_line)
    study, trials = Study(plan, None), list[Trial]()
    known = min(plan.count, DRAWN) if plan.sweep.settings.method == "tpe" else plan.count
    while len(trials) < known and (trial := study.next()) is not None:
        trials.append(trial)
        study.fail(trial, {})  # of a study that is kept nowhere: for the next one to come
    counts = shared([build(plan.trial(trial.values), home) for trial in trials], home)
    for trial in trials:
        console.print(Text(f"trial {trial.number}: {values_text(trial.values)}"))
    if known < plan.count:
        console.print(f"trials {known + 1} to {plan.count}: chosen by what these come to")
    console.print()
    for title, count in counts.items():
        console.print(Text(f"{title:<34} {f'{count} different' if count > 1 else 'made once for all'}"))
    console.print(Text(f"sweep {plan.name}: {plan.target.direction} {plan.target.metric} of {plan.target.label}"))
    if as_json_line:
        rows = [{"trial": trial.number, "parameters": trial.values} for trial in trials]
        print_json({"sweep": plan.name, "count": plan.count, "trials": rows, "steps": counts})
