"""`score`: what a reward model gives to the answers of a file.

One decision: the rows go through the data steps and the evaluation of a pipeline, as steps with keys. So numbers are
those of an evaluation, bad rows are found and named as in training, and what was scored before is not scored again.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.card_facts import finished
from flows.cli.output import DONE, FAILED, people, print_json, say_error
from flows.cli.rewards import print_rewards
from flows.graph import Pipeline, build
from flows.view import View, make_view
from registry.errors import InputError, Problem, did_you_mean
from registry.evaluation_records import EvaluationSettings
from registry.home import Home
from registry.loading import load_recipe
from registry.stage_settings import StageSettings
from tasks.artifacts import Artifact, Store
from tasks.digests import DigestMemory
from tasks.evaluate_program import write_lines
from tasks.evaluation import evaluate_step
from tasks.fetch import ROWS, fetch_step, file_names
from tasks.jsonlines import read_json_lines, read_object
from tasks.launch import ProgramFailed
from tasks.measurements import by_set
from tasks.model import base_input
from tasks.render import render_step
from tasks.rewards import require_reward_model
from tasks.sequences import TokenizedRows
from tasks.shards import tokenize_step
from tasks.source_rows import source_list
from tasks.steps import Input, Step, do

SHOWN = 10
SHOWN_LEFT_OUT = 5
STAGE = "score"
# of the stage that made a model: what its texts look like, and how it is computed
KEPT = ("default_system", "enable_thinking", "control_tokens", "bf16", "per_device_eval_batch_size")
CURE = "Name the folder of a reward model, or the recipe of a finished run."


@dataclass(frozen=True)
class Scorer:
    """A reward model, and how the rows of a file are read for it."""

    model: Input
    folder: Path
    name: str
    """For people, and for the folders of artifacts."""
    settings: StageSettings
    """Of a stage whose data set is the file."""


@dataclass(frozen=True)
class Scored:
    """What was made of a file."""

    made: dict[str, Artifact]
    """Kind of step → its artifact."""
    files: list[str]
    """The files that the rows came from."""


def score_file(model: str, file: str, stage: str | None, out: Path | None, overrides: list[str], as_json: bool) -> int:
    """Score every answer of a file; the exit code.

    Args:
        model: folder of a reward model, or the recipe of a finished run.
        file: rows in any form that data sets have.
        stage: of the recipe; None: its only one of kind rm.
        out: JSON lines, one for each row that was scored.
        overrides: of the recipe, or of the settings that the rows are read with.
        as_json: print one object for programs.

    Raises:
        InputError: a model that is not there or no reward model, rows that cannot be read, a target that is there.
    """
    console = people(as_json)
    if out:
        _require_new(out)
    home = Home.open()
    of = _of_folder if Path(model).expanduser().is_dir() else _of_recipe
    scorer = of(model, file, stage, overrides, home)
    require_reward_model(scorer.folder, model)
    view = make_view(console)
    try:
        scored = _score(scorer, home, view)
    except ProgramFailed as error:
        say_error(str(error))
        return FAILED
    finally:
        view.close()
    name = scorer.settings.sources[0].name
    results = by_set(scored.made["evaluate"].path, [name])[name]
    scores, left_out = _scores(scored), list(_left_out(scored))
    if out:
        try:
            write_lines(out, scores)
        except OSError as error:
            say_error(f"{out} was not written: {error}")
            return FAILED
    _print_rows(console, scores)
    print_rewards(console, f"{scorer.name} on {name}", results)
    _print_left_out(console, left_out, len(scores))
    if out:
        console.print(f"{out}: {len(scores)} lines", markup=False, soft_wrap=True)
    if as_json:
        answer = {"model": scorer.name, "folder": str(scorer.folder), "rows": len(scores), "results": results}
        answer |= {"left_out": left_out, "out": str(out) if out else None}
        print_json(answer | ({} if out else {"scores": scores}))
    return DONE


def _require_new(out: Path) -> None:
    """A mistyped name must not cost a data set, and what cannot be written is said before anything is computed."""
    if os.path.lexists(out):
        raise InputError(Problem(f"--out {out}", "is there already", "Remove it, or name another file."))
    if not os.access(out.parent, os.W_OK):
        raise InputError(Problem(f"--out {out}", f"nothing can be written to {out.parent}", "Name another folder."))


def _of_folder(model: str, file: str, stage: str | None, overrides: list[str], home: Home) -> Scorer:
    """The model of a folder, which says nothing of the stage that made it."""
    if stage is not None:
        raise InputError(Problem("--stage", f"belongs to a recipe, and {model} is a folder", "Leave it out."))
    folder = Path(model).expanduser().absolute()
    base, name = base_input(str(folder), "main", home)
    return Scorer(base, folder, name, _settings(folder, file, {}, overrides))


def _of_recipe(model: str, file: str, stage: str | None, overrides: list[str], home: Home) -> Scorer:
    """The model of a stage of a finished run."""
    if os.sep in model and not Path(model).expanduser().exists():
        raise InputError(Problem(model, "there is no such folder and no such recipe", CURE))
    pipeline = build(load_recipe(model, overrides), home)
    name = _stage(pipeline, stage)
    steps = pipeline.stages[name]
    folder = finished(pipeline, name, [steps.model], model, home, "score")[steps.model.title].path
    settings = steps.settings
    written = settings.data.model_dump() | settings.train.model_dump() | settings.runtime.model_dump()
    kept = {key: written[key] for key in KEPT if written[key] is not None}
    return Scorer(Input(steps.model), folder, f"{pipeline.recipe.name}-{name}", _settings(folder, file, kept, []))


def _stage(pipeline: Pipeline, wanted: str | None) -> str:
    """The stage that is meant; the only reward model by default.

    Raises:
        InputError: there is none, or several, or the one that is named is none.
    """
    names = [name for name, steps in pipeline.stages.items() if steps.settings.train.stage == "rm"]
    if wanted is not None and wanted not in pipeline.stages:
        rule = f"{wanted!r} is no stage of {pipeline.recipe.name}"
        raise InputError(Problem("--stage", rule, did_you_mean(wanted, list(pipeline.stages))))
    if not names:
        raise InputError(Problem(pipeline.recipe.name, "none of its stages is of kind rm, which makes a score", CURE))
    if wanted is None and len(names) > 1:
        rule = f"{pipeline.recipe.name} makes the reward models {' and '.join(names)}"
        raise InputError(Problem("--stage", rule, "Name one."))
    if wanted is not None and wanted not in names:
        rule = f"stage {wanted} is of kind {pipeline.stages[wanted].settings.train.stage}, which makes no score"
        raise InputError(Problem("--stage", rule, f"Name {' or '.join(names)}."))
    return wanted or names[0]


def _settings(folder: Path, file: str, kept: dict[str, Any], overrides: list[str]) -> StageSettings:
    """How the rows are read: whole, as long as the model can see; what cannot be used is left out and told."""
    config = read_object(folder / "config.json")
    longest = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    raw = {
        "name": STAGE,
        "stage": "rm",
        "model_name_or_path": str(folder),
        "dataset": [{"dataset": file}],
        "bad_rows": "skip",
        "bad_rows_limit": 1.0,
        **({"cutoff_len": longest} if longest else {}),
    }
    return load_recipe(raw | kept, overrides).stages[0]


def _score(scorer: Scorer, home: Home, view: View) -> Scored:
    """Make the steps; their artifacts."""
    settings, base = scorer.settings, scorer.model
    store, memory, stop = Store(home), DigestMemory(home.digests), threading.Event()
    made: dict[str, Artifact] = {}

    def make(step: Step) -> Path:
        view.started(step)
        try:
            outcome = do(step, store, memory, stop, lambda event: view.event(step, event))
        except BaseException as error:
            view.failed(step, error)
            raise
        view.ended(step, outcome)
        made[step.kind] = outcome.artifact
        return outcome.artifact.path

    def fetch(shape: str) -> Step:
        given = (settings.sources, settings.data, settings.runtime, shape, settings.train.seed, memory)
        return fetch_step(STAGE, "fetch", *given, split=False)

    fetched = fetch("chat")  # what any rows with answers can be read as
    downloads = {name: make(i.source) for name, i in fetched.inputs.items() if isinstance(i.source, Step)}
    fetched = fetch(source_list(fetched, downloads, memory)[0].form().holds)
    rendered = render_step(STAGE, "render", fetched, ROWS, base, settings.data, settings.template)
    tokenized = tokenize_step(STAGE, "tokenize", rendered, base, settings.data, packing=False)
    sets = {settings.sources[0].name: tokenized}
    evaluated = evaluate_step(STAGE, "evaluate", scorer.name, base, sets, EvaluationSettings(), settings)
    for step in (fetched, rendered, tokenized, evaluated):
        make(step)
    return Scored(made, file_names(made["fetch"].path, fetched.runtime)[0])


def _scores(scored: Scored) -> list[dict[str, Any]]:
    """One line for each row: its number, counted from 0, in its file, and its scores."""
    folder = scored.made["tokenize"].path
    texts = TokenizedRows(folder)
    lines = read_json_lines(scored.made["evaluate"].path / "rewards.0.jsonl")
    wide = len(texts) // len(lines)  # texts of a row: two of a pair
    files = texts.files()[::wide].tolist()
    answer = []
    for line, file, row in zip(lines, files, texts.numbers()[::wide].tolist(), strict=True):
        place = {"file": scored.files[file]} if len(scored.files) > 1 else {}
        pair = {name: line[name] for name in ("chosen", "rejected") if name in line}
        values = pair | {"margin": pair["chosen"] - pair["rejected"]} if pair else {"score": line["score"]}
        answer.append({**place, "row": row, **values})
    return answer


def _left_out(scored: Scored) -> Iterator[dict[str, Any]]:
    """The rows that have no score: `file`, `place`, `row`, `reason`, `detail`."""
    for kind in ("fetch", "render", "tokenize"):
        yield from read_json_lines(scored.made[kind].path / "report" / "rejected.jsonl")


def _print_rows(console: Console, scores: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in scores[0]:
        table.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for line in scores[:SHOWN]:
        table.add_row(*(Text(f"{value:.4f}" if isinstance(value, float) else str(value)) for value in line.values()))
    console.print(table)
    if len(scores) > SHOWN:
        console.print(Text(f"… and {len(scores) - SHOWN:,} more", style="dim"))
    console.print()


def _print_left_out(console: Console, left_out: list[dict[str, Any]], scored: int) -> None:
    if not left_out:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(row["reason"] for row in left_out).items())
    console.print(Text(f"left out {len(left_out)} of {len(left_out) + scored} rows: {reasons}", style="yellow"))
    for row in left_out[:SHOWN_LEFT_OUT]:
        console.print(Text(f"  {row['file']}, {row['place']}: {row['detail']}", style="yellow"), soft_wrap=True)
