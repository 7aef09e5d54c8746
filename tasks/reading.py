"""Data files to raw rows, in chunks, in memory that does not grow with the file.

One decision: a row that cannot be read is a value (`BadRow`), not an exception, so one policy decides about all bad
rows and every one of them is reported with its file and place. A file that cannot be read is one `InputError`.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy
import orjson

from registry.errors import InputError, Problem
from tasks.cuts import Cuts
from tasks.digests import DigestMemory
from tasks.raw_rows import BAD, CHUNK_BYTES, CHUNK_ROWS, BadRow, RawChunk, RawRow, place
from tasks.reading_arrays import array_chunks
from tasks.reading_files import open_data, require_kind
from tasks.reading_lines import line_chunks, text_chunks
from tasks.reading_tables import table_chunks

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_ROWS",
    "BadRow",
    "RawChunk",
    "RawRow",
    "chunk_rows",
    "count_rows",
    "place",
    "raw_chunks",
    "read_rows",
]

LONG_NUMBER = re.compile(rb"\d{19}")  # may not fit 64 bits; orjson would read such an integer as a float


def raw_chunks(path: Path, memory: DigestMemory | None = None) -> Iterator[RawChunk]:
    """The rows of a data file, not parsed, at most `CHUNK_ROWS` or about `CHUNK_BYTES` at a time.

    Where a chunk ends depends only on the rows before, so appending rows to a file changes none but the last chunk.

    Args:
        path: .json (an array, or lines), .jsonl, .csv, .tsv, .parquet, .arrow or .txt; also compressed.
        memory: of where files of lines were cut the last time; what is still the same there is read and not cut.

    Raises:
        InputError: the file is of another kind, damaged, or not what its name says.
        OSError: it cannot be read.
    """
    kind, compression = require_kind(path)
    if kind not in (".json", ".jsonl", ".txt"):
        yield from table_chunks(path)
        return
    with open_data(path) as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    array = kind != ".txt" and head.startswith(b"[")
    if kind != ".txt":
        _require_lines(head, path)
    with open_data(path) as file:
        if array:
            yield from array_chunks(file, path)
            return
        cuts = Cuts(memory, path) if memory and not compression else None
        yield from text_chunks(file, path, cuts) if kind == ".txt" else line_chunks(file, path, cuts)


def _require_lines(head: bytes, path: Path) -> None:
    """Refuse one object spread over several lines, whose every line would be a bad row.

    Raises:
        InputError: the first line opens an object and does not end it.
    """
    first, more, _ = head.partition(b"\n")
    if more and first.startswith(b"{") and first.rstrip().endswith((b"{", b"[", b",")):
        rule = "one JSON object over several lines, neither an array of rows nor a row on each line"
        raise InputError(Problem(str(path), rule, "Save the list of rows that it holds."))


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a data file, in file order.

    Raises:
        InputError, OSError: as `raw_chunks`.
    """
    for chunk in raw_chunks(path):
        yield from chunk_rows(chunk)


def chunk_rows(chunk: RawChunk) -> list[RawRow]:
    """The rows of a chunk; one that cannot be read has a `BadRow` as its value."""
    rows: list[RawRow] = []
    careful = _has_long_number(chunk.data)
    row, line_number = chunk.first_row, chunk.first_line
    for number, line in enumerate(chunk.data[:-1].split(b"\n")):
        if not line or line.isspace():
            continue
        rows.append(RawRow(row, line_number and line_number + number, _parsed(line, careful), line))
        row += 1
    return rows


def count_rows(path: Path, memory: DigestMemory | None = None) -> int:
    """Rows of a data file, those that cannot be read among them.

    Args:
        path, memory: as for `raw_chunks`.

    Raises:
        InputError, OSError: as `raw_chunks`.
    """
    return sum(chunk.rows for chunk in raw_chunks(path, memory))


def _has_long_number(data: bytes) -> bool:
    """Whether there are 19 digits in a row somewhere.

    Of bytes four apart, four in a row are then digits: few places are left to look at closely. A search through every
    byte takes four times as long as parsing does.
    """
    sampled = numpy.frombuffer(data, dtype=numpy.uint8)[::4]
    digits = (sampled - numpy.uint8(48)) < 10  # unsigned: what is below "0" wraps around
    if len(digits) < 4:
        return bool(LONG_NUMBER.search(data))
    places = numpy.flatnonzero(digits[:-3] & digits[1:-2] & digits[2:-1] & digits[3:])
    return any(LONG_NUMBER.search(data, max(0, 4 * place - 19), 4 * place + 38) for place in places.tolist())


def _parsed(line: bytes, careful: bool) -> dict[str, Any] | BadRow:
    if careful and LONG_NUMBER.search(line):
        return _parsed_exactly(line)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return _parsed_exactly(line)
    return value if type(value) is dict else _not_an_object(value)


def _parsed_exactly(line: bytes) -> dict[str, Any] | BadRow:
    """What a line that orjson refuses, or would round, holds; or why it holds nothing."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", f"byte {error.start} of the line is not UTF-8 text; save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_json", f"not valid JSON ({error})")
    if not isinstance(value, dict):
        return _not_an_object(value)
    if not _writable(value):
        return BadRow("not_utf8", "half of a surrogate pair (\\ud800 to \\udfff) is no text")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text} is too large")
    return number


def _not_an_object(value: Any) -> BadRow:
    if isinstance(value, list) and len(value) == 3 and value[0] == BAD:
        return BadRow(str(value[1]), str(value[2]))
    return BadRow("not_an_object", f"a row is a JSON object, this is {type(value).__name__}")


def _writable(value: Any) -> bool:
    """Whether every text in a row can be written as UTF-8: an escape in JSON can spell half a character."""
    if isinstance(value, dict):
        return all(_writable(key) and _writable(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_writable, value))
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
