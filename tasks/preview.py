"""Rows as training will see them, one by one and without writing anything: for `preview`, `check` and pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tasks.canonical import chunk_files, read_table
from tasks.fetch import converted_rows
from tasks.reading import BadRow, place
from tasks.render import RenderedText, RowRenderer
from tasks.sequences import IGNORED
from tasks.shards import RowFitter
from tasks.steps import Step
from tasks.tokens import TOKENIZERS, Text, TextEncoder, characters

PARTS = {"preference": ("chosen", "rejected")}
PLAIN, CONTROL, TYPED, ADDED, NO_TOKEN = "plain", "control", "typed", "added", "no_token"


class TokenPiece(NamedTuple):
    """One token and what of the text it stands for; the texts of all pieces, joined, are the row's text."""

    text: str
    """Empty where the characters of a token belong to the piece before: a character of several tokens is in its first.
    """
    token: int | None
    """Id; None for text without a token."""
    trained: bool
    kind: str = PLAIN
    """`plain`; `control`: a control token; `typed`: part of a control token's text that somebody typed, which is text
    like any other; `added`: a token that the text does not have; `no_token`: text beyond `cutoff_len`, or dropped by
    the tokenizer."""
    name: str = ""
    """Of an `added` token."""


@dataclass(frozen=True)
class SeenRow:
    """One text of one row, or why there is none."""

    file: str
    row: int
    """0-based number in its file."""
    place: str
    part: str = ""
    """`chosen` or `rejected`; empty where a row is one text."""
    text: str | None = None
    spans: list[int] = field(default_factory=list)
    """Flat byte offsets of what is trained."""
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    typed: list[int] = field(default_factory=list)
    """Flat byte offsets of control tokens that somebody typed."""
    pieces: tuple[TokenPiece, ...] = ()
    """Where asked for, the text by tokens."""
    lost: tuple[str, ...] = ()
    """What the row has and the text has not."""
    refused: BadRow | None = None
    step: str = ""
    """The step that refuses it: `fetch`, `render` or `tokenize`."""

    @property
    def stands_for_row(self) -> bool:
        """True but for the second text of a pair: a pair is refused once."""
        return self.part in ("", PARTS["preference"][0])

    @property
    def trained_tokens(self) -> int:
        """Tokens that are predicted and trained: the first of a row is never predicted."""
        return sum(label != IGNORED for label in (self.labels or ())[1:])


def steps_behind(tokenize: Step) -> tuple[Step, Step]:
    """The fetch and the render step that a tokenize step stands on."""
    render = tokenize.inputs["rendered"].source
    assert isinstance(render, Step)
    fetch = render.inputs["rows"].source
    assert isinstance(fetch, Step)
    return fetch, render


def rows_seen(tokenize: Step, base: Path, inputs: Mapping[str, Path], by_token: bool = False) -> Iterator[SeenRow]:
    """Every row of a tokenize step's data sets; those that `val_size` keeps back are among them.

    Args:
        tokenize: the step; the fetch and render steps are those it stands on.
        base: the model's folder.
        inputs: folders of what the fetch step downloads.
        by_token: fill in `SeenRow.pieces`.

    Raises:
        InputError: as the steps do for data sets, templates and tokenizers that cannot be used at all.
    """
    fetch, render = steps_behind(tokenize)
    renderer = RowRenderer(render.identity, base)
    fitter = RowFitter.make(tokenize.identity, base, renderer.meta(), TOKENIZERS)
    for _, file, raw, rows in converted_rows(fetch, inputs):
        where: dict[str, Any] = {"file": str(file), "row": raw.row, "place": place(raw.row, raw.line)}
        if isinstance(rows, BadRow):
            yield SeenRow(**where, refused=rows, step="fetch")
            continue
        for row in rows:
            texts = renderer.render(row)
            if isinstance(texts, BadRow):
                yield SeenRow(**where, refused=texts, step="render")
                continue
            for seen in _seen(where, PARTS.get(renderer.shape, ("",)), texts, fitter):
                whole = by_token and seen.refused is None
                yield replace(seen, pieces=tuple(token_pieces(seen, fitter.encoder))) if whole else seen


def _seen(
    where: dict[str, Any], parts: Sequence[str], texts: Sequence[RenderedText], fitter: RowFitter
) -> Iterator[SeenRow]:
    """The texts of one row: all of them are used, or none."""
    batch, _, refused = fitter.fit([Text(text.text, text.spans, text.typed) for text in texts])
    bad = next((bad for bad in refused if bad), None)
    labels = batch.labels()
    for number, (part, text) in enumerate(zip(parts, texts, strict=True)):
        own: dict[str, Any] = {"text": text.text, "spans": text.spans, "typed": text.typed, "lost": text.lost}
        if bad:
            yield SeenRow(**where, **own, part=part, refused=bad, step="tokenize")
            continue
        tokens = slice(int(batch.offsets[number]), int(batch.offsets[number + 1]))
        yield SeenRow(**where, **own, part=part, input_ids=batch.ids[tokens].tolist(), labels=labels[tokens].tolist())


def token_pieces(row: SeenRow, encoder: TextEncoder) -> Iterator[TokenPiece]:
    """The text of a row cut into its tokens, in order.

    Args:
        row: one with `text` and `input_ids`.
        encoder: of the step that made the ids.
    """
    assert row.text is not None
    assert row.input_ids is not None
    borders = characters(row.text, row.typed)
    typed = list(zip(borders[::2], borders[1::2], strict=True))
    ids, offsets = encoder.reference.encode(row.text, typed)
    trained = [number > 0 and label != IGNORED for number, label in enumerate(row.labels or ())]
    control = {encoder.tokenizer.token_to_id(token) for token in encoder.control_tokens}
    lead = 1 if encoder.writes_bos(ids) and row.input_ids else 0
    if lead:
        yield _added(row.input_ids[0], False, encoder)
    kept = min(len(ids), len(row.input_ids) - lead)
    position = 0
    for token, mark, (start, end) in zip(ids[:kept], trained[lead : lead + kept], offsets[:kept], strict=True):
        if start > position:
            yield TokenPiece(row.text[position:start], None, False, NO_TOKEN)
            position = start
        is_typed = any(first < end and start < last for first, last in typed)
        kind = TYPED if is_typed else CONTROL if token in control else PLAIN
        yield TokenPiece(row.text[position : max(position, end)], token, mark, kind)
        position = max(position, end)
    if position < len(row.text):
        yield TokenPiece(row.text[position:], None, False, NO_TOKEN)
    for token, mark in zip(row.input_ids[lead + kept :], trained[lead + kept :], strict=True):
        yield _added(token, mark, encoder)


def _added(token: int, trained: bool, encoder: TextEncoder) -> TokenPiece:
    return TokenPiece("", token, trained, ADDED, encoder.tokenizer.id_to_token(token) or "")


def read_rendered(artifact: Path, limit: int) -> list[dict[str, Any]]:
    """The first texts of a render artifact: `text`, `spans` (flat byte offsets), `row`, `line`."""
    rows: list[dict[str, Any]] = []
    for chunk in chunk_files(artifact / "rows"):
        rows += read_table(chunk).slice(0, limit - len(rows)).to_pylist()
        if len(rows) >= limit:
            break
    return rows


def pieces(text: str, spans: list[int]) -> Iterator[tuple[str, bool]]:
    """A text cut at its spans: (piece, whether it is trained).

    >>> list(pieces("ab", [1, 2]))
    [('a', False), ('b', True)]
    """
    data, position = text.encode("utf-8"), 0
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        if start > position:
            yield data[position:start].decode("utf-8"), False
        yield data[start:end].decode("utf-8"), True
        position = end
    if position < len(data):
        yield data[position:].decode("utf-8"), False


def marked(text: str, spans: list[int]) -> str:
    """A rendered row with the trained part between ⟦ and ⟧, which are seen without colour too."""
    return "".join(f"⟦{piece}⟧" if trained else piece for piece, trained in pieces(text, spans))
