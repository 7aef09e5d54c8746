"""Recipe files and overrides to a validated recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.core import read_text, read_yaml, user_path
from registry.errors import InputError, Problem, did_you_mean
from registry.recipe import Recipe, build_recipe
from registry.recipes import RECIPES

SUFFIXES = (".yaml", ".yml", ".json")


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by registry name.

    Raises:
        InputError: neither exists.
    """
    path = user_path(name, "recipe")
    if path.is_file():
        return path.absolute()
    if name in RECIPES:
        return RECIPES[name]
    if path.is_dir():
        raise InputError(Problem(str(path.absolute()), "a folder, not a recipe file", "Name the file in it."))
    if path.suffix in SUFFIXES or "/" in name:
        raise InputError(Problem(str(path.absolute()), "the recipe file does not exist", "Check the path."))
    raise InputError(
        Problem("recipe", f"{name!r} is neither a file nor a known recipe", did_you_mean(name, list(RECIPES)))
    )


def load_recipe(recipe: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, validate.

    Args:
        recipe: path, registry name, or the mapping itself.
        overrides: `a.b=c` each, typed as in the file.

    Raises:
        InputError: everything that is wrong, at once.
    """
    return build_recipe(*read_recipe(recipe, overrides))


def read_recipe(recipe: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[Any, Path, str]:
    """What a recipe says, overrides applied, not validated; the folder that its relative paths start at, and its title.

    Raises:
        InputError: there is no such file, it cannot be read, or an override does not fit.
    """
    if isinstance(recipe, str):
        path = find_recipe(recipe)
        folder, title = path.parent, path.name
        raw = read_yaml(read_text(path), str(path))
    else:
        folder, title, raw = Path.cwd(), str(recipe.get("name", "recipe")), dict(recipe)
    return override(raw, overrides), folder, title


def override(raw: Any, overrides: Sequence[str]) -> Any:
    """A copy of `raw` with overrides applied.

    >>> override({"stages": {"sft": {"seed": 1}}}, ["stages.sft.seed=2", "name=x"])
    {'stages': {'sft': {'seed': 2}}, 'name': 'x'}

    Raises:
        InputError: an override is not `a.b=c`, or leads through something that is not a mapping.
    """
    problems = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not all(key.strip().split(".")):
            problems.append(Problem(f"--set {text}", "an override is key=value, e.g. stages.sft.learning_rate=1e-4"))
            continue
        try:
            raw = put(raw, key.strip(), read_yaml(value, f"--set {text}"), f"--set {text}")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return raw


def put(raw: Any, key: str, value: Any, where: str) -> Any:
    """A copy of a recipe with one setting.

    Args:
        raw: the recipe as written.
        key: dotted path of the setting.
        value: of it.
        where: for the error.

    Raises:
        InputError: there is no such stage, or something on the way is not a mapping.
    """
    keys = key.split(".")
    stages = raw.get("stages") if isinstance(raw, dict) else None
    if keys[0] == "stages" and len(keys) > 1 and isinstance(stages, dict) and keys[1] not in stages:
        raise InputError(Problem(where, f"no stage {keys[1]!r}", did_you_mean(keys[1], list(stages))))
    try:
        return _put(raw, keys, value)
    except KeyError as error:
        raise InputError(Problem(where, f"{error.args[0]} is not a mapping in this recipe")) from error


def _put(raw: Any, keys: list[str], value: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise KeyError("the recipe" if not isinstance(raw, str) else raw)
    if len(keys) == 1:
        return raw | {keys[0]: value}
    inner = raw.get(keys[0], {})
    if not isinstance(inner, dict):
        raise KeyError(keys[0])
    return raw | {keys[0]: _put(inner, keys[1:], value)}
