"""fetch: data files → canonical rows in Parquet chunks.

One decision: a chunk is a fixed number of source rows under a declared schema, so what a chunk holds depends on its
own rows only, whatever else the file contains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from registry.data_sources import DataSource
from registry.errors import InputError, Problem
from registry.records import DataSettings
from tasks.digests import DigestMemory
from tasks.formats import ChatRow, detect, to_chat
from tasks.reading import BadRow, RawRow, read_rows
from tasks.rejects import Rejects
from tasks.steps import Step, Work

VERSION = 2  # tools and tool calls of another form than functions are bad rows
CHUNK_ROWS = 2000
ROWS, KEPT_BACK = "rows", "kept_back"
SKIP_CURE = "Mend the rows, or set bad_rows: skip to leave them out."

MESSAGE = pa.struct(
    [(name, pa.string()) for name in ("role", "content", "reasoning", "tool_calls", "name", "tool_call_id")]
)
SCHEMA = pa.schema(
    [
        ("messages", pa.list_(MESSAGE)),
        ("tools", pa.string()),
        ("source", pa.int32()),
        ("row", pa.int64()),
        ("place", pa.string()),
    ]
)


def fetch_step(
    stage: str,
    name: str,
    sources: tuple[DataSource, ...],
    data: DataSettings,
    seed: int,
    memory: DigestMemory,
    split: bool,
) -> Step:
    """The step that reads data sets.

    Args:
        stage, name: where it stands in the plan.
        sources: the data sets, in order.
        data: `max_samples`, `val_size`, `bad_rows`.
        seed: of the choice of rows kept back.
        memory: digests of the files; a file counts by its bytes, not by its name.
        split: keep rows back for evaluation, as `val_size` says.
    """
    described = [
        {
            "sha256": memory.sha256(source.file),
            "formatting": source.formatting,
            "columns": dict(source.columns),
            "tags": dict(source.tags),
            "num_samples": source.num_samples,
        }
        for source in sources
    ]
    identity: dict[str, Any] = {"sources": described, "max_samples": data.max_samples, "bad_rows": data.bad_rows}
    if split and data.val_size:
        identity |= {"val_size": data.val_size, "seed": seed}
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label="-".join(source.name for source in sources),
        identity=identity,
        inputs={},
        run="tasks.fetch:fetch",
        runtime={"files": [str(source.file) for source in sources]},
        packages=("pyarrow",),
    )


def fetch(work: Work) -> dict[str, Any]:
    """Read every source, write `rows/` (and `kept_back/`), report rows left out.

    Raises:
        InputError: a bad row under `bad_rows: fail`, or nothing left.
    """
    files = work.step.runtime["files"]
    rejects = Rejects()
    total = 0
    writer = _Writer(work.output / ROWS)
    for file, raw, chat in converted_rows(work.step):
        total += 1
        if isinstance(chat, BadRow):
            rejects.add(file, raw.place, raw.row, chat)
        else:
            writer.add(chat | {"source": files.index(file), "row": raw.row, "place": raw.place})
        if total % CHUNK_ROWS == 0:
            work.progress(total, 0, "rows")
    writer.close()
    if work.identity["bad_rows"] == "fail":
        rejects.raise_if_any("data", SKIP_CURE)
    _require_rows(work.step, writer.rows, rejects)
    rejects.write(work.output)
    counts: dict[str, Any] = {"rows_read": total, "rows": writer.rows, "left_out": rejects.counts()}
    if "val_size" in work.identity:
        counts["kept_back"] = _keep_back(work.output, work.identity["val_size"], work.identity["seed"], writer.rows)
        counts["rows"] -= counts["kept_back"]
    return counts


def converted_rows(step: Step) -> Iterator[tuple[str, RawRow, ChatRow | BadRow]]:
    """Every row of a fetch step's sources: file, raw row, and its chat form or why it has none."""
    for file, source in zip(step.runtime["files"], step.identity["sources"], strict=True):
        for raw, chat in _converted(Path(file), source, step.identity["max_samples"]):
            yield file, raw, chat


def count_rows(step: Step) -> tuple[int, dict[str, int]]:
    """Usable rows of a fetch step, and reason → rows left out, without writing anything.

    Raises:
        InputError: as `fetch` does.
    """
    rejects, usable = Rejects(), 0
    for file, raw, chat in converted_rows(step):
        if isinstance(chat, BadRow):
            rejects.add(file, raw.place, raw.row, chat)
        else:
            usable += 1
    if step.identity["bad_rows"] == "fail":
        rejects.raise_if_any("data", SKIP_CURE)
    _require_rows(step, usable, rejects)
    if "val_size" in step.identity:
        _kept_back(step.identity["val_size"], usable)
    return usable, rejects.counts()


def _require_rows(step: Step, usable: int, rejects: Rejects) -> None:
    if usable == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.counts().items())
        rule = f"no usable row: {reasons or 'the files hold no rows'}"
        raise InputError(Problem(", ".join(step.runtime["files"]), rule, "A data set needs at least one."))


def _converted(
    file: Path, source: dict[str, Any], max_samples: int | None
) -> Iterator[tuple[RawRow, ChatRow | BadRow]]:
    """Rows of one file with their chat form; the format of an undeclared file is that of its first readable row."""
    limits = [limit for limit in (max_samples, source["num_samples"]) if limit is not None]
    formatting, columns = source["formatting"], source["columns"]
    for raw in read_rows(file):
        if limits and raw.row >= min(limits):
            return
        if isinstance(raw.value, BadRow):
            yield raw, raw.value
            continue
        if formatting is None:
            found = detect(raw.value)
            if found is None:
                have = ", ".join(raw.value)
                rule = f"the columns ({have}) are those of no known format"
                cure = "Known: instruction and output (alpaca), conversations (sharegpt), messages (openai)."
                raise InputError(Problem(f"{file}, {raw.place}", rule, cure))
            formatting, columns = found
        yield raw, to_chat(raw.value, formatting, columns, source["tags"])


class _Writer:
    """Rows to Parquet chunks of CHUNK_ROWS."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.buffer, self.rows, self.chunks = folder, list[dict[str, Any]](), 0, 0

    def add(self, row: dict[str, Any]) -> None:
        self.buffer.append(row)
        self.rows += 1
        if len(self.buffer) == CHUNK_ROWS:
            self.close()

    def close(self) -> None:
        """Write what is buffered."""
        if self.buffer:
            write_chunk(self.folder, self.chunks, pa.Table.from_pylist(self.buffer, SCHEMA))
            self.buffer, self.chunks = [], self.chunks + 1


def write_chunk(folder: Path, number: int, table: pa.Table) -> None:
    """Write one chunk, whole or absent."""
    path = folder / f"{number:05d}.parquet"
    pq.write_table(table, path.with_suffix(".part"), compression="zstd")
    path.with_suffix(".part").rename(path)


def read_chunks(folder: Path) -> list[Path]:
    """The chunks of a folder, in order."""
    return sorted(folder.glob("*.parquet"))


def _kept_back(val_size: float, rows: int) -> int:
    """How many rows `val_size` keeps back.

    Raises:
        InputError: none or all of them.
    """
    wanted = round(val_size * rows) if val_size < 1 else int(val_size)
    if not 0 < wanted < rows:
        rule = f"val_size {val_size:g} keeps back {wanted} of {rows} rows"
        raise InputError(Problem("val_size", rule, "At least one row on either side."))
    return wanted


def _keep_back(output: Path, val_size: float, seed: int, rows: int) -> int:
    """Move the rows chosen for evaluation to `kept_back/`.

    A row is chosen by the hash of seed, source and row number, so that which rows are kept back does not depend on
    how many rows the other sources have.

    Raises:
        InputError: nothing would be left to train on.
    """
    wanted = _kept_back(val_size, rows)
    chunks = [pq.read_table(path) for path in read_chunks(output / ROWS)]
    ranks = sorted(
        (hashlib.sha256(f"{seed}:{source}:{row}".encode()).digest(), source, row)
        for chunk in chunks
        for source, row in zip(chunk["source"].to_pylist(), chunk["row"].to_pylist(), strict=True)
    )
    chosen = {(source, row) for _, source, row in ranks[:wanted]}
    (output / KEPT_BACK).mkdir()
    for number, chunk in enumerate(chunks):
        pairs = zip(chunk["source"].to_pylist(), chunk["row"].to_pylist(), strict=True)
        back = pa.array([pair in chosen for pair in pairs])
        write_chunk(output / KEPT_BACK, number, chunk.filter(back))
        write_chunk(output / ROWS, number, chunk.filter(pa.compute.invert(back)))
    return wanted
