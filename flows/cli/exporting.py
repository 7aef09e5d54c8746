"""`export`: the model of a finished run, as a folder and on the hub."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.cli.card_facts import card_of, finished
from flows.cli.gguf_export import FileWanted, GgufExport
from flows.cli.output import DONE, FAILED, people, print_json, say_error
from flows.graph import Pipeline, build
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.loading import load_recipe
from registry.recipe import Recipe
from registry.stages import METHODS
from tasks.artifacts import Artifact
from tasks.card import Card
from tasks.export import (
    DEFAULT_SHARD_SIZE,
    Exported,
    export,
    parse_dtype,
    parse_size,
    require_target,
    saved_dtype,
)
from tasks.launch import ProgramFailed
from tasks.push import PushFailed, open_repository, push_folder

SECONDS = 2.0  # before the first progress line, and between two on a terminal
LOG_SECONDS = 15.0  # between two in a log


@dataclass(frozen=True)
class Wanted:
    """The options of the command, as they were given."""

    stage: str | None = None
    to: Path | None = None
    adapter: bool = False
    dtype: str | None = None
    max_shard_size: str | None = None
    push_to_hub: str | None = None
    private: bool = False
    file: FileWanted = field(default_factory=FileWanted)


def export_recipe(name: str, overrides: list[str], wanted: Wanted, as_json: bool) -> int:
    """Write the folder, and send it where it is asked for; the exit code.

    Raises:
        InputError: options that cannot be, a run that is not finished, a target that is not free.
    """
    answer = write_model(load_recipe(name, overrides), name, wanted, people(as_json))
    if as_json and answer is not None:
        print_json(answer)
    return FAILED if answer is None else DONE


def write_model(recipe: Recipe, name: str, wanted: Wanted, console: Console) -> dict[str, Any] | None:
    """Write the folder, and send it where it is asked for.

    Args:
        recipe: whose model it is; its run is finished.
        name: what people call it.
        wanted: what, and where.
        console: for people.

    Returns:
        What programs are told; None: the disk or the hub failed, and that was said.

    Raises:
        InputError: as `export_recipe`.
    """
    dtype, size = checked(wanted)
    home = Home.open()
    pipeline = build(recipe, home)
    stage = _stage(pipeline, wanted)
    steps = pipeline.stages[stage]
    own = pipeline.measured.get(stage)
    measured = [*own.steps, *(pipeline.measured[own.before].steps if own.before else ())] if own else []
    ends = [steps.model, *measured]
    artifacts = finished(pipeline, stage, ends, name, home, "export")
    artifact = artifacts[(steps.trained if wanted.adapter else steps.model).title]
    saved = saved_dtype(artifact)
    card = card_of(pipeline, stage, artifacts, wanted.adapter, saved, dtype or saved)
    target = (wanted.to or Path(card.name)).expanduser().resolve()
    require_target(target)
    file = GgufExport(artifact, card.name, steps.settings, wanted.file, _said(console)) if wanted.file.any else None
    if wanted.push_to_hub:
        open_repository(wanted.push_to_hub, wanted.private)
    base = card.base.hub_id if wanted.adapter and card.on_base else None
    folder = Exported(artifact, target, None if dtype == saved else dtype, None if wanted.adapter else size, base)
    try:
        files = export(folder, card.text(), home, Progress(console), file.further() if file else None)
    except (OSError, ProgramFailed) as error:
        say_error(f"{target} was not written: {error}")
        return None
    console.print(f"{target}: {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB", markup=False, soft_wrap=True)
    answer = _answer(card, artifact, target, files) | ({"gguf": file.answer} if file else {})
    if wanted.push_to_hub:
        try:
            answer["commit"] = _push(console, target, wanted.push_to_hub, card)
        except PushFailed as error:
            say_error(str(error))
            return None
    return answer


def checked(wanted: Wanted) -> tuple[str | None, int]:
    """Dtype and bytes of a file; everything that is wrong with the options at once."""
    problems: list[Problem] = []
    dtype, size = None, 0
    try:
        dtype = parse_dtype(wanted.dtype) if wanted.dtype else None
    except InputError as error:
        problems += error.problems
    try:
        size = parse_size(wanted.max_shard_size or DEFAULT_SHARD_SIZE)
    except InputError as error:
        problems += error.problems
    if wanted.adapter and wanted.max_shard_size:
        problems.append(Problem("--max-shard-size", "an adapter is one file: peft reads no other", "Leave it out."))
    if wanted.private and not wanted.push_to_hub:
        problems.append(Problem("--private", "is about a repository of the hub", "Name one with --push-to-hub."))
    problems += wanted.file.problems(wanted.adapter)
    if problems:
        raise InputError(problems)
    return dtype, size


def _said(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, markup=False, soft_wrap=True)


def _stage(pipeline: Pipeline, wanted: Wanted) -> str:
    """The stage that is meant; the last one by default.

    Raises:
        InputError: no such stage, or one without an adapter where an adapter is wanted.
    """
    names = list(pipeline.stages)
    used = {named for steps in pipeline.stages.values() for named in steps.settings.references().values()}
    ends = [name for name in names if name not in used]
    if wanted.stage is None and len(ends) > 1:
        raise InputError(Problem("--stage", f"{pipeline.recipe.name} ends with {' and '.join(ends)}", "Name one."))
    stage = wanted.stage or ends[0]
    if stage not in names:
        rule = f"{stage!r} is no stage of {pipeline.recipe.name}"
        raise InputError(Problem("--stage", rule, did_you_mean(stage, names)))
    method = pipeline.stages[stage].settings.train.finetuning_type
    if wanted.adapter and METHODS[method].makes != "adapter":
        rule = f"stage {stage} trains whole weights (finetuning_type: {method}), there is no adapter"
        raise InputError(Problem("--adapter", rule, "Leave it out."))
    return stage


def _push(console: Console, folder: Path, repo: str, card: Card) -> str:
    from huggingface_hub.utils import disable_progress_bars

    if not console.is_terminal:
        disable_progress_bars()
    console.print(f"sending to {repo}", markup=False, soft_wrap=True)
    commit = push_folder(folder, repo, f"{card.name}, content digest {card.exported.digest[:12]}")
    console.print(f"sent: {commit}", markup=False, soft_wrap=True)
    return commit


def _answer(card: Card, artifact: Artifact, target: Path, files: dict[str, int]) -> dict[str, Any]:
    return {
        "stage": card.stages[-1].name,
        "folder": str(target),
        "artifact": str(artifact.path),
        "key": artifact.key,
        "digest": artifact.digest,
        "dtype": card.dtype,
        "files": files,
        "commit": None,
    }


class Progress:
    """A line for what takes longer than two seconds: what is done and how much of it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = time.monotonic() + SECONDS

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (SECONDS if self._console.is_terminal else LOG_SECONDS)
        self._console.print(f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", markup=False)
