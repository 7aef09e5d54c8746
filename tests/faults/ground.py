"""What every fault is measured against: one run that nobody disturbed, and how a place in a run is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.flows.processes import checkpoint
from tests.flows.toy import run, toy_recipe, write_rows

ROWS = 12_000  # more chunks than the flow's own process makes
STEPS = 12
KINDS = ("fetch", "render", "tokenize", "train", "merge", "evaluate")
GATE = "perplexity.held_out < 1e6"  # always met: what counts is that it is decided


@dataclass(frozen=True)
class Place:
    """A moment of a run."""

    name: str
    gone: tuple[str, ...]
    """Kinds of artifacts that are made anew in order to come there."""
    reached: Callable[[Path], bool]
    """Whether the run of a home is there."""
    has_programs: bool = True
    """Whether something beside the flow's own process is at work there."""


def _working(kind: str) -> Callable[[Path], bool]:
    return lambda home: any(home.glob(f"work/{kind}-*/output"))


def _made(home: Path, kind: str) -> int:
    return len(list(home.glob(f"artifacts/{kind}/*/manifest.json")))


PLACES = {
    place.name: place
    for place in (
        *(Place(kind, KINDS[n:], _working(kind)) for n, kind in enumerate(KINDS[:3])),
        Place("train", KINDS[3:], lambda home: checkpoint(home) > 2),
        Place("between", KINDS[3:], lambda home: _made(home, "train") > 0, has_programs=False),
        Place("merge", KINDS[4:], lambda home: any(home.glob("work/merge-*/program.log"))),
        Place("evaluate", KINDS[5:], lambda home: any(home.glob("work/evaluate-*/program.log"))),
        Place("promote", KINDS[5:], lambda home: _made(home, "evaluate") > 1, has_programs=False),
    )
}


@dataclass(frozen=True)
class Ground:
    """An undisturbed run."""

    recipe: Path
    home: Path
    digests: dict[str, str]
    """Step title → digest of its artifact."""


def undisturbed(folder: Path, ranks: int = 1) -> Ground:
    """Make a recipe and run it.

    Args:
        folder: where the recipe and the home go.
        ranks: processes that train.
    """
    recipe = toy_recipe(folder / "recipe", steps=STEPS, nproc_per_node=ranks)
    write_rows(folder / "recipe" / "train.jsonl", ROWS)
    raw = json.loads(recipe.read_text())
    raw["evaluation"]["gate"] = [GATE]
    recipe.write_text(json.dumps(raw))
    answer = run("run", str(recipe), LLAMATUNER_HOME=str(folder / "home"))
    return Ground(recipe, folder / "home", digests(answer))


def digests(answer: dict[str, Any]) -> dict[str, str]:
    """Step title → digest, of what `run --json` tells."""
    return {f"{step['stage']}/{step['step']}": step["digest"] for step in answer["steps"]}


def lacking(home: Path, place: Place) -> None:
    """Remove from a home what is made at a place and behind it."""
    for kind in place.gone:
        shutil.rmtree(home / "artifacts" / kind, ignore_errors=True)
    if "tokenize" in place.gone:  # or the step would find its rows done, and need nobody to do them
        shutil.rmtree(home / "chunks", ignore_errors=True)
