"""Recipe files and overrides to a validated recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from registry.core import read_text, read_yaml, user_path
from registry.errors import InputError, Problem, did_you_mean
from registry.recipe import Recipe, build_recipe
from registry.recipes import RECIPES

SUFFIXES = (".yaml", ".yml", ".json")
REMOVED = object()  # in place of a value: the setting is taken out


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


def load_recipe(
    recipe: str | Mapping[str, Any] | None, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> Recipe:
    """Read, override, validate.

    Args:
        recipe: path, registry name, or the mapping itself; None: `settings` are one.
        overrides: `a.b=c` each, typed as in the file; `a.b=` takes a setting out.
        settings: laid over the recipe before, see `overlay`.

    Raises:
        InputError: everything that is wrong, at once.
    """
    built = build_recipe(*read_recipe(recipe, overrides, settings))
    out = [f"{text.rstrip().rstrip('=')}: taken out of the recipe" for text in overrides if text.rstrip().endswith("=")]
    return replace(built, notes=(*built.notes, *out))


def read_recipe(
    recipe: str | Mapping[str, Any] | None, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> tuple[Any, Path, str]:
    """What a recipe says, as `load_recipe` takes it, not validated; the folder that its paths start at, and its title.

    Raises:
        InputError: there is no such file, it cannot be read, or an override does not fit.
    """
    if isinstance(recipe, str):
        path = find_recipe(recipe)
        folder, title = path.parent, path.name
        raw = read_yaml(read_text(path), str(path))
    else:
        raw = dict(recipe or {})
        folder, title = Path.cwd(), str(raw.get("name", "recipe"))
    return override(overlay(raw, settings or {}), overrides), folder, title


def overlay(raw: Any, settings: Mapping[str, Any]) -> Any:
    """A recipe with settings in its own form in place of those it has; what is empty there stays as it is.

    >>> overlay({"name": "x", "stages": {"sft": {"seed": 1}}}, {"name": "", "stages": {"sft": {"max_steps": 2}}})
    {'name': 'x', 'stages': {'sft': {'seed': 1, 'max_steps': 2}}}

    Raises:
        InputError: a setting above the stages that every stage has its own of, so that nothing would come of it.
    """
    stages = raw.get("stages") if isinstance(raw, dict) else None
    own = [stage for stage in stages.values() if isinstance(stage, dict)] if isinstance(stages, dict) else []
    rule, cure = "every stage of the recipe has its own", "Write it as stages.STAGE.{}."
    hidden = [
        Problem(key, rule, cure.format(key))
        for key, value in settings.items()
        if own and not _empty(value) and value != raw.get(key) and all(key in stage for stage in own)
    ]
    if hidden:
        raise InputError(hidden)
    return _laid(raw, settings)


def _laid(raw: Any, settings: Mapping[str, Any]) -> Any:
    laid = dict(raw) if isinstance(raw, dict) else {}
    for key, value in settings.items():
        value = _laid(laid.get(key), value) if isinstance(value, Mapping) else value
        if not _empty(value):
            laid[key] = value
    return laid


def _empty(value: Any) -> bool:
    """Whether a field of a form was left empty."""
    return value is None or value in ("", [], {})


def override(raw: Any, overrides: Sequence[str]) -> Any:
    """A copy of `raw` with overrides applied.

    >>> override({"stages": {"sft": {"seed": 1}}}, ["stages.sft.seed=2", "name=x"])
    {'stages': {'sft': {'seed': 2}}, 'name': 'x'}
    >>> override({"seed": 1, "name": "x"}, ["seed="])
    {'name': 'x'}

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
            given = read_yaml(value, f"--set {text}") if value.strip() else REMOVED
            raw = put(raw, key.strip(), given, f"--set {text}")
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
        return raw | {keys[0]: value} if value is not REMOVED else {k: v for k, v in raw.items() if k != keys[0]}
    inner = raw.get(keys[0], {})
    if not isinstance(inner, dict):
        raise KeyError(keys[0])
    return raw | {keys[0]: _put(inner, keys[1:], value)}
