"""`preview`: rows as training will see them."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from flows.cli.output import people, print_json
from flows.cli.pages import require_page, write_page
from flows.graph import StageSteps, build
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Store
from tasks.digests import DigestMemory
from tasks.preview import SeenRow, pieces, rows_seen, steps_behind
from tasks.preview_page import FIRST_LINE, StageRows, preview_page
from tasks.steps import LocalFolder, do, upstream

SHOWN = 5
SHOWN_ON_PAGE = 100
BASE = "base"


def preview_recipe(name: str, overrides: list[str], rows: int | None, as_json: bool, page: Path | None) -> None:
    """Render and tokenize rows of each stage's training data, without running a pipeline.

    The base model is fetched when it is not there yet: its tokenizer and template are needed.

    Raises:
        InputError: the page's file cannot be written, or is another file that is there.
    """
    if page:
        require_page(page, FIRST_LINE)
    console = people(as_json)
    home = Home.open()
    pipeline = build(load_recipe(name, overrides), home)
    limit = rows or (None if as_json else SHOWN_ON_PAGE if page else SHOWN)
    shown: list[StageRows] = []
    for steps in pipeline.stages.values():
        inputs = _input_folders(steps, home, lambda text: console.print(Text(text, style="dim")))
        seen = rows_seen(steps.tokenized, inputs.pop(BASE), inputs, by_token=page is not None)
        kept = list(islice(seen, limit))
        shown.append(StageRows(steps.settings.name, kept, next(seen, None) is not None))
    if page:
        write_page(page, preview_page(pipeline.recipe.name, shown))
        count = sum(len(stage.rows) for stage in shown)
        console.print(Text(f"{page}: {count} texts{', and there are more' if any(s.more for s in shown) else ''}"))
    else:
        for stage in shown:
            for row in stage.rows:
                _print_row(console, row)
    if as_json:
        answer: dict[str, Any] = {"rows": [_plain(stage.name, row) for stage in shown for row in stage.rows]}
        print_json(answer | ({"html": str(page)} if page else {}))


def _print_row(console: Console, row: SeenRow) -> None:
    part = f", {row.part}" if row.part else ""
    console.print(Text(f"{row.file}, {row.place}{part}", style="bold"))
    if row.refused:
        console.print(Text(f"refused: {row.refused.reason}: {row.refused.detail}\n", style="red"))
        return
    text = Text()
    for piece, trained in pieces(row.text or "", row.spans):
        # without colour the trained part is still seen by its brackets
        text.append(
            f"⟦{piece}⟧" if trained and not console.is_terminal else piece, style="bold green" if trained else "dim"
        )
    console.print(text)
    lost = f"; the template drops: {', '.join(row.lost)}" if row.lost else ""
    console.print(Text(f"{len(row.input_ids or ())} tokens, {row.trained_tokens} trained{lost}\n", style="cyan"))


def _plain(stage: str, row: SeenRow) -> dict[str, Any]:
    values = {"stage": stage} | asdict(replace(row, pieces=()))
    del values["step"], values["pieces"]
    return values


def _input_folders(stage: StageSteps, home: Home, say: Any) -> dict[str, Path]:
    """Folders of the base model, as `base`, and of downloaded data sets; what is not there is fetched."""
    fetch, render = steps_behind(stage.tokenized)
    sources = {BASE: render.inputs["base"].source, **{name: wanted.source for name, wanted in fetch.inputs.items()}}
    store, memory = Store(home), DigestMemory(home.digests)

    def emit(event: dict[str, Any]) -> None:
        if event["kind"] == "note":
            say(event["text"])

    folders = {}
    for name, source in sources.items():
        if isinstance(source, LocalFolder):
            folders[name] = source.path
            continue
        for step in upstream([source]):
            folders[name] = do(step, store, memory, threading.Event(), emit).artifact.path
    return folders
