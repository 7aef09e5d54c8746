"""`evaluate`: a recipe that trains nothing, written on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

SEVERAL = ("--perplexity", "--benchmarks", "--generate")
"""Options that take every word up to the next option."""


class SeveralValues(TyperCommand):
    """A command whose options of `SEVERAL` may have several values, as in `--benchmarks arc_easy piqa`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(arguments: Sequence[str]) -> list[str]:
    """Arguments with the option written anew before each of its values.

    >>> spread(["m", "--benchmarks", "piqa", "boolq", "--json"])
    ['m', '--benchmarks', 'piqa', '--benchmarks', 'boolq', '--json']
    """
    found: list[str] = []
    option: str | None = None
    for word in arguments:
        if word.startswith("-"):
            option = word if word in SEVERAL else None
            found.append(word)
        elif option is not None and found[-1] != option:
            found += [option, word]
        else:
            found.append(word)
    return found


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; the names are those of `evaluation`."""

    perplexity: list[str]
    benchmarks: list[str]
    generate: list[str]
    compare_with: str | None = None
    reward_model: str | None = None
    data_dir: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None


def evaluate_model(model: str, asked: Asked, overrides: list[str], as_json: bool) -> int:
    """Measure a model; the exit code.

    Args:
        model: see `flows.named_models.find_model`.
        asked: what to measure.
        overrides: of the recipe that this makes: `evaluation.limit=100`, `template=chatml`.
        as_json: print one object for programs: `results`, metric and set → value, and the same of what it is compared
            with under `base`.

    Raises:
        InputError: everything wrong with the model, the data or the benchmarks, before anything is loaded.
    """
    from flows.cli.running import run_recipe

    evaluation = {name: value for name, value in vars(asked).items() if value not in (None, [])}
    name = "evaluate-" + re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-")[:50]
    recipe = {"name": name, "evaluate": model, "evaluation": evaluation}

    def told(answer: dict[str, Any]) -> dict[str, Any]:
        results = answer.pop("results")
        compared = {"base": {"results": results["base"]}} if "base" in results else {}
        return {"model": model, "results": results.get("model", {}), **compared, **answer}

    return run_recipe(recipe, overrides, as_json, False, told=told)
