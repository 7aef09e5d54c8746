"""Rendered rows for people's eyes: text with the trained part marked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.fetch import read_chunks


def read_rendered(artifact: Path, limit: int) -> list[dict[str, Any]]:
    """The first rows of a render artifact: `text`, `spans` (flat byte offsets), `row`, `place`."""
    rows: list[dict[str, Any]] = []
    for chunk in read_chunks(artifact / "rows"):
        rows += pq.read_table(chunk).slice(0, limit - len(rows)).to_pylist()
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
