"""Canonical rows as Arrow tables, and back.

One decision: tables are built from flat columns and never through a schema found in the data, so a chunk costs a few
microseconds a row and has the same columns whatever its rows hold.

Every table has `row` (int64, 0-based in its file) and `line` (int32, 1-based; 0 where the file has no lines).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

Row = dict[str, Any]

MESSAGE_FIELDS = ("role", "content", "reasoning", "tool_calls", "name", "tool_call_id")
MESSAGE = pa.struct([(name, pa.string()) for name in MESSAGE_FIELDS])
MESSAGES = pa.list_(MESSAGE)
PLACE = {"row": pa.int64(), "line": pa.int32()}
COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "text": {"text": pa.string()},
    "chat": {"messages": MESSAGES, "tools": pa.string()},
    "preference": {
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "tools": pa.string(),
        "margin": pa.float64(),
    },
    "labelled": {"prompt": MESSAGES, "completion": MESSAGES, "tools": pa.string(), "label": pa.bool_()},
    "prompt": {"prompt": MESSAGES, "tools": pa.string(), "reference": pa.string()},
}
"""Columns of the five shapes; the stages that take them are in `registry.stages`."""
MARKS = {"preference": "margin", "labelled": "label", "prompt": "reference"}
"""Shape → the column that says what else is known of a row's texts; it goes with them to training."""


def mark_field(shape: str) -> list[pa.Field]:
    """The field of the mark of a shape; none for shapes without."""
    return [pa.field(MARKS[shape], COLUMNS[shape][MARKS[shape]])] if shape in MARKS else []


def schema(shape: str) -> pa.Schema:
    """The columns of a shape, with the place of each row."""
    return pa.schema((COLUMNS[shape] | PLACE).items())


def to_table(rows: Sequence[Row], shape: str) -> pa.Table:
    """Rows of one shape, each with `row` and `line`, as a table."""
    wanted = schema(shape)
    columns = [
        _messages([row[field.name] for row in rows])
        if field.type == MESSAGES
        else pa.array([row.get(field.name) for row in rows], field.type)
        for field in wanted
    ]
    return pa.Table.from_arrays(columns, schema=wanted)


def _messages(lists: Sequence[Sequence[Row]]) -> pa.ListArray:
    offsets, flat = [0], list[Row]()
    for messages in lists:
        flat += messages
        offsets.append(len(flat))
    fields = [pa.array([message.get(name) for message in flat], pa.string()) for name in MESSAGE_FIELDS]
    values = pa.StructArray.from_arrays(fields, MESSAGE_FIELDS)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def to_rows(table: pa.Table, shape: str) -> list[Row]:
    """The rows of a table; a message has only the fields that it was given, and always `content`."""
    table = table.combine_chunks()
    names = list((COLUMNS[shape] | PLACE).keys())
    columns = [_lists(table[name]) if table[name].type == MESSAGES else table[name].to_pylist() for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _lists(column: pa.ChunkedArray) -> list[list[Row]]:
    if column.num_chunks == 0:
        return []
    array = column.chunk(0)
    flat = array.flatten()
    fields = {name: flat.field(name) for name in MESSAGE_FIELDS}
    # most messages are role and content, and nothing else
    given = {n: a.to_pylist() for n, a in fields.items() if n in ("role", "content") or a.null_count < len(a)}
    rare = [name for name in given if name not in ("role", "content")]
    messages: list[Row] = [
        {"role": role, "content": content} for role, content in zip(given["role"], given["content"], strict=True)
    ]
    for name in rare:
        for message, value in zip(messages, given[name], strict=True):
            if value is not None:
                message[name] = value
    offsets = array.offsets.to_pylist()
    first = offsets[0] if offsets else 0
    return [messages[a - first : b - first] for a, b in pairwise(offsets)]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a chunk as an Arrow file, compressed."""
    options = pa.ipc.IpcWriteOptions(compression="lz4")  # zstd saves a third of the space and takes twice the time
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)


def read_table(path: Path) -> pa.Table:
    """Read a chunk."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def chunk_files(folder: Path) -> list[Path]:
    """The chunks of an artifact's folder, in order."""
    return sorted(folder.glob("*.arrow"))
