"""`promote` and `rollback`: which version of a model is the champion."""

from __future__ import annotations

from rich.text import Text

from flows.cli.output import DONE, FAILED, people, print_json
from flows.cli.report import gate_lines
from flows.comparison import find_side
from flows.model_events import tell_decided
from flows.promotion import promote, roll_back
from registry.errors import InputError, Problem
from registry.gates import CURE, condition
from registry.home import Home


def promote_run(asked: str, gate: list[str], as_json: bool) -> int:
    """Make the model of a finished run the champion if it passes a gate; the exit code: 1 when it does not.

    Args:
        asked: see `flows.comparison.find_side`.
        gate: conditions, see `registry.gates`.
        as_json: print one object for programs.

    Raises:
        InputError: no such run, a condition of another form, a metric that was not measured.
    """
    if not gate:
        raise InputError(Problem("--gate", "nothing says when a model is good enough", CURE))
    problems, conditions = list[Problem](), []
    for text in gate:
        try:
            conditions.append(condition(text, "--gate"))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    home, console = Home.default(), people(as_json)
    record = promote(find_side(asked, home), conditions, home)
    for line in gate_lines(record):
        console.print(line)
    tell_decided(record, home, lambda text: console.print(text, style="yellow", markup=False))
    if as_json:
        print_json(record)
    return DONE if record["passed"] else FAILED


def roll_back_model(name: str, as_json: bool) -> None:
    """Make the champion before champion again."""
    record = roll_back(name, Home.default())
    text = f"{name} version {record['version']} is the champion again, instead of version {record['instead_of']}"
    people(as_json).print(Text(text, style="bold"))
    if as_json:
        print_json(record)
