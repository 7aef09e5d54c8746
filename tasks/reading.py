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

from registry.data_files import kind_of
from registry.errors import InputError, Problem
from tasks.cuts import Cut, Cuts
from tasks.digests import DigestMemory, blake3_file
from tasks.raw_rows import BAD, CHUNK_BYTES, CHUNK_ROWS, BadRow, RawChunk, RawRow, place
from tasks.reading_arrays import array_chunks
from tasks.reading_files import open_data, require_kind
from tasks.reading_lines import cut_again, line_chunks, text_chunks
from tasks.reading_tables import table_chunks

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_ROWS",
    "BadRow",
    "RawChunk",
    "RawRow",
    "chunk_rows",
    "count_rows",
    "file_digest",
    "known_cuts",
    "place",
    "raw_chunks",
    "read_rows",
]

LINES = (".json", ".jsonl", ".txt")
LONG_NUMBER = re.compile(rb"\d{19}")  # may not fit 64 bits; orjson would read such an integer as a float


def raw_chunks(path: Path, known: list[Cut] | None = None) -> Iterator[RawChunk]:
    """The rows of a data file, not parsed, at most `CHUNK_ROWS` or about `CHUNK_BYTES` at a time.

    Where a chunk ends depends only on the rows before, so appending rows to a file changes none but the last chunk.

    Args:
        path: .json (an array, or lines), .jsonl, .csv, .tsv, .parquet, .arrow or .txt; also compressed.
        known: where a file of lines is to be cut, see `known_cuts`; its chunks are then read when they are wanted.

    Raises:
        InputError: the file is of another kind, damaged, or not what its name says.
        OSError: it cannot be read.
    """
    kind = require_kind(path)[0]
    if kind not in LINES:
        yield from table_chunks(path)
        return
    head = _head(path)
    array = kind != ".txt" and head.startswith(b"[")
    if kind != ".txt":
        _require_lines(head, path)
    with open_data(path) as file:
        if array:
            yield from array_chunks(file, path)
        else:
            yield from text_chunks(file, path, known) if kind == ".txt" else line_chunks(file, path, known)


def file_digest(path: Path, memory: DigestMemory) -> str:
    """What a data file holds, as 64 hex digits: equal for equal bytes, whatever has been read before.

    It is remembered by path, size, mtime and inode. Of a file of lines that has changed, what is proved to be as it
    was is not looked through again.

    Raises:
        OSError: it cannot be read.
    """
    kind, compression = kind_of(path.name) or ("", "")
    if kind not in LINES or compression or (kind != ".txt" and _head(path).startswith(b"[")):
        return memory.blake3(path)
    return memory.remembered(path, "cuts:", lambda path: _digest_of_cuts(path, memory))


def _digest_of_cuts(path: Path, memory: DigestMemory) -> str:
    try:
        with open_data(path) as file:
            return cut_again(file, path, Cuts(memory, path))
    except InputError:  # whoever reads its rows says what is wrong with it
        return blake3_file(path)


def known_cuts(path: Path, digest: str, memory: DigestMemory) -> list[Cut] | None:
    """Where a file of lines is to be cut that had this digest when it was last looked at; None: nobody knows."""
    return Cuts(memory, path).of(digest)


def _head(path: Path) -> bytes:
    """The start of a file's text, without byte order mark and white space."""
    with open_data(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()


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


def count_rows(path: Path, known: list[Cut] | None = None) -> int:
    """Rows of a data file, those that cannot be read among them.

    Args:
        path, known: as for `raw_chunks`.

    Raises:
        InputError, OSError: as `raw_chunks`.
    """
    return sum(each.rows for each in (raw_chunks(path) if known is None else known))


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
