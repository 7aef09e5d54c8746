"""`compare`: what differs between finished runs, on a terminal, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.output import people, print_json
from flows.cli.pages import require_page, write_page
from flows.comparison import Measured, Side, answers, differing_settings, find_side, measured
from flows.comparison_page import FIRST_LINE, comparison_page, letter
from registry.errors import InputError, Problem
from registry.home import Home
from tasks.number_picture import COLOURS

LONGEST_VALUE = 30  # characters of a setting on a terminal


def compare_runs(asked: list[str], page: Path | None, record: bool, as_json: bool) -> None:
    """Compare stages of finished runs.

    Args:
        asked: see `flows.comparison.find_side`.
        page: a file for a browser to write as well.
        record: keep it in MLflow, and on the pages of a Prefect server.
        as_json: print one object for programs.

    Raises:
        InputError: a run that is not there, fewer than two, or too many to tell apart.
    """
    if not 2 <= len(asked) <= len(COLOURS):
        raise InputError(Problem("compare", f"{len(asked)} to compare", f"Name two to {len(COLOURS)} runs."))
    if page:
        require_page(page, FIRST_LINE)
    home, console = Home.default(), people(as_json)
    sides = [find_side(each, home) for each in asked]
    settings, numbers, told = differing_settings(sides), measured(sides), answers(sides)
    _who(console, sides)
    _settings(console, settings, len(sides))
    for row in numbers:
        _number(console, row)
    for question, found in told:
        console.print(Text(f"Q  {question}", style="bold"))
        for number, text in enumerate(found):
            console.print(Text(f"   {letter(number)}: {'–' if text is None else text}"))
        console.print()
    answer: dict[str, Any] = {
        "sides": [{"name": side.name, "run": side.run, "stage": side.stage} for side in sides],
        "settings": [{"setting": name, "values": values} for name, values in settings],
        "metrics": [asdict(row) for row in numbers],
        "answers": [{"question": question, "answers": found} for question, found in told],
    }
    html = comparison_page(sides, settings, numbers, told) if page or record else ""
    if page:
        write_page(page, html)
        console.print(f"page: {page}", markup=False, soft_wrap=True)
    if record:
        from flows.comparison_record import keep_comparison

        kept = keep_comparison(sides, numbers, html, answer, home, lambda text: console.print(text, markup=False))
        answer["mlflow_run_id"] = kept
    if as_json:
        print_json(answer | ({"html": str(page)} if page else {}))


def _who(console: Console, sides: Sequence[Side]) -> None:
    for number, side in enumerate(sides):
        lines = [line["loss"] for line in side.curve() if "loss" in line]
        curve = f", training loss {lines[0]:.3g} → {lines[-1]:.3g}" if lines else ""
        console.print(Text(f"{letter(number)}  {side.run} {side.stage}{curve}", style="bold"))
    console.print()


def _settings(console: Console, settings: Sequence[tuple[str, list[Any]]], count: int) -> None:
    if not settings:
        console.print("no setting differs\n")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", overflow="fold")
    for number in range(count):
        table.add_column(letter(number), overflow="fold")
    for name, values in settings:
        table.add_row(Text(name), *(Text(_short(value)) for value in values))
    console.print(table)
    console.print()


def _short(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _number(console: Console, row: Measured) -> None:
    console.print(Text(f"{row.metric}, {row.rows:,} {'row' if row.rows == 1 else 'rows'}", style="bold"))
    for number, (result, difference) in enumerate(zip(row.results, row.differences, strict=True)):
        if result is None:
            console.print(Text(f"   {letter(number)}  –"))
            continue
        line = f"   {letter(number)}  {result['value']:<9.4g}"
        if "low" in result:
            line += f" 95 %: {result['low']:.4g} to {result['high']:.4g}"
        console.print(Text(line.rstrip()))
        if difference:
            what = "differs" if difference["real"] else "may be chance"
            text = f"      {difference['value']:+.3g}"
            if "low" in difference:
                text += f"   95 %: {difference['low']:+.3g} to {difference['high']:+.3g}"
            console.print(Text(f"{text}: {what}", style="green" if difference["real"] else "dim"))
    console.print()
