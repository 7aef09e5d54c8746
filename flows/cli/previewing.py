"""`preview`: rows as training will see them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from rich.text import Text

from flows.cli.output import people, print_json
from flows.graph import StageSteps, build
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Store
from tasks.digests import DigestMemory
from tasks.preview import pieces
from tasks.steps import LocalFolder, Step, do, upstream

SHOWN = 5


def preview_recipe(name: str, overrides: list[str], rows: int | None, as_json: bool) -> None:
    """Render and tokenize rows of each stage's training data, without running a pipeline.

    The base model is fetched when it is not there yet: its tokenizer and template are needed.
    """
    console = people(as_json)
    home = Home.open()
    pipeline = build(load_recipe(name, overrides), home)
    shown = []
    for stage in pipeline.stages.values():
        base = _base_folder(stage, home, lambda text: console.print(Text(text, style="dim")))
        limit = rows or (None if as_json else SHOWN)
        shown += [row | {"stage": stage.settings.name} for row in preview_rows(stage, base, limit)]
    for row in shown:
        console.print(Text(f"{row['file']}, {row['place']}", style="bold"))
        if row["refused"]:
            console.print(Text(f"refused: {row['refused']['reason']}: {row['refused']['detail']}\n", style="red"))
            continue
        text = Text()
        for piece, trained in pieces(row["text"], row["spans"]):
            # without colour the trained part is still seen by its brackets
            text.append(
                f"⟦{piece}⟧" if trained and not console.is_terminal else piece, style="bold green" if trained else "dim"
            )
        console.print(text)
        trained_tokens = sum(label != -100 for label in row["labels"])
        console.print(Text(f"{len(row['input_ids'])} tokens, {trained_tokens} trained\n", style="cyan"))
    if as_json:
        keys = ("stage", "file", "place", "row", "text", "input_ids", "labels", "refused")
        print_json({"rows": [{key: row[key] for key in keys} for row in shown]})


def _base_folder(stage: StageSteps, home: Home, say: Any) -> Path:
    source = stage.rendered.inputs["base"].source
    if isinstance(source, LocalFolder):
        return source.path
    store, memory, folder = Store(home), DigestMemory(home.digests), home.path

    def emit(event: dict[str, Any]) -> None:
        if event["kind"] == "note":
            say(event["text"])

    for step in upstream([source]):
        folder = do(step, store, memory, threading.Event(), emit).artifact.path
    return folder


def preview_rows(stage: StageSteps, base: Path, limit: int | None) -> list[dict[str, Any]]:
    """Rows with text, spans, ids, labels, or the reason why they are refused.

    Args:
        stage: whose training rows.
        base: the base model's folder.
        limit: most rows, None for all.
    """
    from tasks.fetch import converted_rows
    from tasks.reading import BadRow
    from tasks.render import RowRenderer
    from tasks.shards import RowEncoder

    fetched = _fetch_of(stage)
    renderer = RowRenderer.from_step(stage.rendered, base)
    encoder = RowEncoder.from_step(stage.tokenized, base)
    found: list[dict[str, Any]] = []
    for file, raw, chat in converted_rows(fetched):
        if limit is not None and len(found) == limit:
            break
        row: dict[str, Any] = {"file": file, "place": raw.place, "row": raw.row, "text": None, "spans": []}
        rendered = chat if isinstance(chat, BadRow) else renderer.render(chat)
        encoded = rendered if isinstance(rendered, BadRow) else encoder.encode(rendered["text"], rendered["spans"])
        if not isinstance(rendered, BadRow):
            row |= {"text": rendered["text"], "spans": rendered["spans"]}
        if isinstance(encoded, BadRow):
            row |= {"input_ids": None, "labels": None, "refused": {"reason": encoded.reason, "detail": encoded.detail}}
        else:
            row |= {"input_ids": encoded[0], "labels": encoded[1], "refused": None}
        found.append(row)
    return found


def _fetch_of(stage: StageSteps) -> Step:
    source = stage.rendered.inputs["rows"].source
    assert isinstance(source, Step)
    return source
