"""`import`: a config of another program as the recipe it means, for people to keep."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.cli.old_commands import read_config
from registry.core import read_text, read_yaml
from registry.errors import InputError, Problem
from registry.loading import find_recipe
from registry.old_configs import Translated, as_recipe, translate
from registry.recipe import build_recipe
from registry.recipe_paths import absolute_paths
from registry.records import RunSettings
from registry.stage_settings import RECIPE_KEYS


def import_recipe(config: str, out: Path | None) -> None:
    """Write the recipe.

    Args:
        config: the file.
        out: where to; None is standard output. Paths start where the file is, or are absolute where that is not the
            working directory, from which those of the config start.

    Raises:
        InputError: everything wrong with the config, or a file that is there.
    """
    if out is not None and out.exists():
        raise InputError(Problem(f"--out {out}", "is there; nothing is written over", "Name a new file."))
    raw, _ = read_config([config])
    if isinstance(raw, str):  # with stages, whose paths start at the file
        path = find_recipe(raw)
        raw, folder = read_yaml(read_text(path), str(path)), path.parent
    else:
        folder = Path.cwd()
    build_recipe(raw, folder, Path(config).name)  # what is wrong is said as `run` would say it
    beside = out is None or out.absolute().parent == folder
    text = recipe_text(raw if beside else absolute_paths(raw, folder), Path(config).name)
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(Problem(f"--out {out}", f"cannot be written: {error.strerror}", "Name another.")) from error
    print(f"{out}: written")


def recipe_text(raw: Mapping[str, Any], title: str) -> str:
    """A recipe in the words of this project, as YAML with comments.

    Args:
        raw: a config that `build_recipe` takes.
        title: its file, for the first line.
    """
    whole, notes, _ = as_recipe(raw)
    whole = {"name": Path(title).stem} | whole
    lines = [f"# What {title} means here."]
    lines += [f"# {note}" for note in notes]
    top = {key: value for key, value in whole.items() if key not in RECIPE_KEYS}
    lines += _yaml({"name": whole["name"]})
    lines += _yaml({"evaluate": whole["evaluate"]}) if "evaluate" in whole else []
    for key in RunSettings.model_fields:
        lines += _yaml({key: whole[key]}) if key in whole else []
    lines += _section(translate(top, lambda key: key), "")
    stages = whole.get("stages", {})
    lines += ["stages:"] if stages else []
    for name, own in stages.items():
        lines += [f"  {name}:", *_section(translate(own, lambda key: key), "    ")]
    lines += _yaml({"evaluation": whole["evaluation"]}) if "evaluation" in whole else []
    return "\n".join(lines) + "\n"


def _section(found: Translated, indent: str) -> list[str]:
    """Settings, each that was written otherwise with what it was; and what has no effect, with why."""
    lines = []
    for key, value in found.settings.items():
        written = _yaml({key: value}, indent)
        if key in found.origins:
            written[0] += f"  # was {found.origins[key]}"
        lines += written
    return lines + [f"{indent}# {reason}" for reason in found.reasons(lambda key: key)]


def _yaml(values: Mapping[str, Any], indent: str = "") -> list[str]:
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10_000)
    return [f"{indent}{line}" for line in text.splitlines()]
