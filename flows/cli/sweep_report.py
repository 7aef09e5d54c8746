"""What a sweep came to, for people: a line for each trial, the best one, and what to do with it."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.report import print_pages
from flows.sweep_plan import SweepPlan
from flows.sweep_results import Compared, SweepResults
from flows.sweep_study import COMPLETE, FAILED, RUNNING, Trial
from flows.sweeping import number_text, short_names, short_value, values_text
from flows.view import duration
from registry.home import Home
from tasks.measurements import MINIMIZE

APART = 3  # parameters that have a column each
STYLES = {COMPLETE: "", FAILED: "red", RUNNING: "yellow"}


def print_sweep(
    console: Console, plan: SweepPlan, results: SweepResults, home: Home, folder: Path, written: Path | None
) -> None:
    """Everything, in 80 columns.

    Args:
        console: for people.
        plan: of the sweep.
        results: of it.
        home: where runs are.
        folder: of the sweep.
        written: the recipe with the best values.
    """
    console.print()
    _table(console, plan, results)
    for trial in results.trials:
        if "error" in trial.outcome:
            console.print(Text(f"trial {trial.number}: {trial.outcome['error']}", style="red"), soft_wrap=True)
    if results.best is None:
        console.print(Text(f"sweep {plan.name}: no trial came to a number", style="bold"))
        return
    best = results.best
    console.print(Text(f"best: trial {best.number}, {values_text(best.values)}", style="bold"))
    for each in results.compared:
        console.print(Text(sentence(each, best, plan.target.direction)))
    if results.importances:
        names = short_names(list(results.importances))
        shares = ", ".join(f"{names[key]} {share:.0%}" for key, share in results.importances.items())
        console.print(Text(f"importance, estimated: {shares}"))
    console.print(f"pictures and trials: {folder}", markup=False, soft_wrap=True)
    print_pages(console, home)
    run = f"{best.outcome.get('run')}:{plan.target.label}"
    console.print(f"run the best:  llamatuner run {shlex.quote(str(written))}", markup=False, soft_wrap=True)
    if plan.recipe.evaluates is None:
        gates = " ".join(f"--gate {shlex.quote(text)}" for text in plan.recipe.evaluation.gate or ("CONDITION",))
        console.print(f"promote it:    llamatuner promote {run} {gates}", markup=False, soft_wrap=True)


def _table(console: Console, plan: SweepPlan, results: SweepResults) -> None:
    names = short_names(list(plan.sweep.space))
    apart = len(names) <= APART
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    for name in names.values() if apart else ("parameters",):
        table.add_column(name, justify="right" if apart else "left", overflow="fold")
    table.add_column(f"{plan.target.metric}, 95 %", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for trial in results.trials:
        best = results.best is not None and trial.number == results.best.number
        cells = [short_value(trial.values[key]) if key in trial.values else "" for key in names]
        cells = cells if apart else [values_text(trial.values)]
        number = number_text({"value": trial.value, **trial.outcome}) if trial.value is not None else ""
        state = "best" if best else "interrupted" if trial.state == RUNNING else trial.state
        seconds = trial.outcome.get("seconds")
        row = [str(trial.number), *cells, number, state, duration(seconds) if seconds is not None else ""]
        table.add_row(*(Text(cell) for cell in row), style="bold green" if best else STYLES.get(trial.state, ""))
    console.print(table)
    console.print()


def sentence(each: Compared, best: Trial, direction: str) -> str:
    """The best trial beside another, in words; the recipe as it is may be better than all trials."""
    other = "the recipe as it is" if each.trial is None else f"trial {each.trial}"
    other += " (the recipe as it is)" if each.trial is not None and each.as_written else ""
    away = f"{each.value:+.3g} ({each.low:+.3g} to {each.high:+.3g})"
    better = "better" if (each.value < 0) == (direction == MINIMIZE) else "worse"
    if not each.real:
        return f"trial {best.number} differs from {other} by {away}, which may be chance"
    return f"trial {best.number} is {better} than {other} by more than chance: {away}"
