"""`promote` and `rollback`: which version of a model is the champion."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from flows.cli.output import DONE, FAILED, people, print_json
from flows.comparison import find_side
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
    for each in record["conditions"]:
        mark, style = ("met", "green") if each["met"] else ("not met", "red")
        console.print(Text(f"{mark:<8} {each['condition']}: {_numbers(each)}", style=style))
    name = f"{record['model']} version {record['version']}"
    if record["passed"]:
        before = record["champion_before"]
        instead = f", instead of version {before}" if before not in (None, record["version"]) else ""
        console.print(Text(f"{name} is the champion{instead}", style="bold"))
    else:
        console.print(Text(f"Failed gate: {name} was not promoted; nothing was moved", style="bold"))
    if as_json:
        print_json(record)
    return DONE if record["passed"] else FAILED


def _numbers(each: dict[str, Any]) -> str:
    if each["value"] is None:
        return str(each["reason"])
    return f"{each['value']:.4g}, 95 % from {each['low']:.4g} to {each['high']:.4g}"


def roll_back_model(name: str, as_json: bool) -> None:
    """Make the champion before champion again."""
    record = roll_back(name, Home.default())
    text = f"{name} version {record['version']} is the champion again, instead of version {record['instead_of']}"
    people(as_json).print(Text(text, style="bold"))
    if as_json:
        print_json(record)
