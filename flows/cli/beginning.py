"""`init`: asks what is not given, and writes a recipe."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from flows.cli.output import DONE, people, print_json
from registry.errors import InputError, Problem


def begin(path: Path | None, model: str | None, data: str | None, goal: str | None, as_json: bool) -> int:
    """Write a recipe for this machine; the exit code.

    Args:
        path: new file; made of data and goal by default.
        model, data, goal: asked for on a terminal where not given; a goal that fits the rows is found without asking.
        as_json: print one object for programs.

    Raises:
        InputError: something is missing where nobody can be asked, or is not there; a file that is there already.
    """
    from flows.new_recipe import GOALS, Wish, look_at, next_steps, write_recipe
    from registry.loading import load_recipe
    from registry.models import MODELS

    console = people(as_json)
    model = model or _ask(
        "--model", "Model (a name of `llamatuner list models`, a hub id, a folder)", next(iter(MODELS))
    )
    data = data or _ask("--data", "Data (a file, folder, URL, hub id, or a name of `llamatuner list datasets`)", None)
    wish = look_at(Wish(model, data))
    if goal is None:
        goal = _ask_goal(wish.goal, GOALS)
        console.print(f"goal: {goal}, {GOALS.get(goal, '')}", markup=False)
    path = path or Path(f"{Path(data).stem or 'mine'}-{goal}.yaml")
    if path.exists():
        raise InputError(Problem(str(path), "is there; nothing is written over", "Name a new file."))
    text = write_recipe(replace(wish, goal=goal), path)
    path.write_text(text, encoding="utf-8")
    try:
        load_recipe(str(path), [])
    except InputError:
        path.unlink()  # what cannot be run is not left behind
        raise
    console.print(f"{path}: written. Next:", markup=False)
    for command, why in next_steps(path).items():
        console.print(f"  {command:<{max(map(len, next_steps(path)))}}  {why}", markup=False, soft_wrap=True)
    if as_json:
        print_json({"recipe": str(path), "model": model, "data": data, "goal": goal})
    return DONE


def _ask(option: str, question: str, default: str | None) -> str:
    import typer

    if not sys.stdin.isatty():
        raise InputError(Problem(option, "is missing, and there is no terminal to ask on", f"Give {option}."))
    return str(typer.prompt(question, default=default))


def _ask_goal(found: str, goals: dict[str, str]) -> str:
    import typer

    if not sys.stdin.isatty():
        return found
    for name, text in goals.items():
        typer.echo(f"  {name:<5} {text}")
    return str(typer.prompt("Goal (what the rows are for is proposed)", default=found))
