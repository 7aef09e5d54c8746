"""`val_size`: the rows kept back for evaluation.

One decision: a row is chosen by a hash of its own place and the seed, so the choice does not depend on how many rows
other data sets have.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa

from registry.errors import InputError, Problem
from tasks.canonical import read_table, write_table
from tasks.chunks import ChunkCache, Made, make_chunk_of
from tasks.fingerprint import fingerprint
from tasks.steps import Work

Kept = tuple[int, int, Made]
"""Numbers of the data set and of its file, and a chunk of its rows."""


def kept_back_rows(val_size: float, rows: int) -> int:
    """How many rows `val_size` keeps back.

    Raises:
        InputError: none or all of them.
    """
    wanted = round(val_size * rows) if val_size < 1 else int(val_size)
    if not 0 < wanted < rows:
        rule = f"val_size {val_size:g} keeps back {wanted} of {rows} rows"
        raise InputError(Problem("val_size", rule, "At least one row on either side."))
    return wanted


def share_out(work: Work, chunks: list[Kept], rows: int) -> tuple[list[Kept], list[Kept]]:
    """Chunks to train on and chunks kept back.

    Rows that come of one source row stay together.

    Args:
        work: of the fetch step.
        chunks: all of them, in order.
        rows: in them.

    Raises:
        InputError: nothing would be left to train on.
    """
    wanted, seed = kept_back_rows(work.identity["val_size"], rows), work.identity["seed"]
    tables = [read_table(chunk.path) for _, _, chunk in chunks]
    owners = [
        (source, file, row)
        for (source, file, _), table in zip(chunks, tables, strict=True)
        for row in table["row"].to_pylist()
    ]
    ranks = sorted({(hashlib.sha256(f"{seed}:{s}:{f}:{row}".encode()).digest(), s, f, row) for s, f, row in owners})
    chosen = {rank[1:] for rank in ranks[:wanted]}
    back = numpy.array([owner in chosen for owner in owners], numpy.bool_)
    parts: tuple[list[Kept], list[Kept]] = ([], [])
    first = 0
    for (source, file, chunk), table in zip(chunks, tables, strict=True):
        mask = back[first : first + table.num_rows]
        first += table.num_rows
        for part, kept in zip(parts, (~mask, mask), strict=True):
            if kept.all():
                part.append((source, file, chunk))
            elif kept.any():
                part.append((source, file, _part_of(work, chunk, table, kept)))
    return parts


def _part_of(work: Work, chunk: Made, table: pa.Table, kept: Any) -> Made:
    """The chunk of some rows of a chunk, made or found."""
    cache = ChunkCache(work.home, work.step.kind, work.rebuilding)
    key = fingerprint({"part_of": chunk.sha256, "rows": hashlib.sha256(numpy.packbits(kept).tobytes()).hexdigest()})

    def write(_task: dict[str, Any], _payload: bytes, target: Path) -> dict[str, Any]:
        write_table(target, table.filter(pa.array(kept)))
        return {"rows": int(kept.sum())}

    return cache.find(key) or make_chunk_of(cache, key, write)
