"""Files of lines (JSON lines, plain text) to chunks.

One decision: lines are found by looking at whole blocks of bytes at once; nothing is done in Python for a single row,
so a file is cut as fast as it can be read.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy
import orjson

from registry.errors import InputError, Problem
from tasks.cuts import Cut, Cuts
from tasks.raw_rows import CHUNK_BYTES, CHUNK_ROWS, MAX_ROW_BYTES, RawChunk, bad_line
from tasks.reading_files import too_long

BLOCK_BYTES = 4_000_000
SPACES = numpy.zeros(256, dtype=bool)
SPACES[list(b" \t\n\r\x0b\x0c")] = True


def line_chunks(file: BinaryIO, path: Path, known: Iterable[Cut] | None = None) -> Iterator[RawChunk]:
    """The lines of a file as they stand, `CHUNK_ROWS` lines or about `CHUNK_BYTES` at a time.

    Chunks without a row are left out. A byte order mark at the start is dropped, a last line without an end gets one.

    Args:
        file: at its start.
        path: of the file, for messages.
        known: where it is to be cut; None: that is found out now.

    Raises:
        InputError: the file is UTF-16, or has a line of more than `MAX_ROW_BYTES`.
    """
    row, line = 0, 1
    for cut in _cut_anew(file, path, _start(file, path)) if known is None else known:
        if cut.rows:
            yield RawChunk(row, line, cut.data, cut.rows)
        row, line = row + cut.rows, line + cut.lines


def cut_again(file: BinaryIO, path: Path, cuts: Cuts) -> str:
    """Cut a file of lines; what is proved to be a cut of the last time is not searched for.

    Returns:
        The file's digest, see `Cuts.keep`.

    Raises:
        InputError: as `line_chunks`.
    """
    anew: Iterator[Cut] | None = None
    head = _start(file, path)
    offset, line = file.tell() - len(head), 1
    while True:
        cut = cuts.earlier(file, offset)
        if cut:
            anew = None
        else:
            if anew is None:
                file.seek(offset)
                anew = _cut_anew(file, path, b"", line)
            cut = next(anew, None)
            if cut is None:
                break
        cuts.add(offset, cut)
        offset, line = offset + cut.size, line + cut.lines
    return cuts.keep(file.tell())


def _cut_anew(file: BinaryIO, path: Path, buffer: bytes, line: int = 1) -> Iterator[Cut]:
    """All lines that follow, chunks without a row too.

    Args:
        file: at the first of them.
        path: of the file, for messages.
        buffer: what has been read of them already.
        line: 1-based number of the first of them.

    Raises:
        InputError: a line of more than `MAX_ROW_BYTES`.
    """
    at_end = False
    while not at_end:
        block = file.read(BLOCK_BYTES)
        at_end = len(block) < BLOCK_BYTES
        buffer += block
        unended = at_end and bool(buffer) and not buffer.endswith(b"\n")
        if unended:
            buffer += b"\n"
        starts, ends, rows_before = _lines(buffer)
        first = 0
        while first < len(ends):
            full = int(numpy.searchsorted(ends, starts[first] + CHUNK_BYTES)) + 1  # behind the line that fills it
            stop = min(first + CHUNK_ROWS, full)
            whole = stop < len(ends) + (not unended)  # more bytes behind it would change nothing
            if stop > len(ends):
                if not at_end:
                    break
                stop = len(ends)
            rows = int(rows_before[stop] - rows_before[first])
            yield Cut(buffer[starts[first] : ends[stop - 1]], stop - first, rows, whole)
            line, first = line + stop - first, stop
        buffer = buffer[starts[first] if first < len(ends) else ends[-1] if len(ends) else 0 :]
        if len(buffer) > MAX_ROW_BYTES + CHUNK_BYTES:
            raise too_long(f"{path}, behind line {line}")


def _start(file: BinaryIO, path: Path) -> bytes:
    """The first bytes, without a byte order mark.

    Raises:
        InputError: the mark is UTF-16's.
    """
    head = file.read(3)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(Problem(str(path), "UTF-16 text", "Save the file as UTF-8."))
    return head.removeprefix(codecs.BOM_UTF8)


def _lines(buffer: bytes) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Where the whole lines of a buffer begin [n], end [n], and how many rows are before each [n + 1]; all int64."""
    values = numpy.frombuffer(buffer, dtype=numpy.uint8)
    ends = numpy.flatnonzero(values == 10) + 1
    starts = numpy.concatenate([[0], ends[:-1]]).astype(numpy.int64)[: len(ends)]
    filled = numpy.ones(len(ends), dtype=numpy.int64)
    for index in numpy.flatnonzero(SPACES[values[starts]]):  # only a line that begins with white space can be blank
        filled[index] = bool(buffer[starts[index] : ends[index]].strip())
    return starts, ends, numpy.concatenate([[0], numpy.cumsum(filled)])


def text_chunks(file: BinaryIO, path: Path, known: Iterable[Cut] | None = None) -> Iterator[RawChunk]:
    """A row `{"text": line}` for every line that is not blank, in chunks of the file's lines.

    Args:
        file, path, known: as for `line_chunks`.

    Raises:
        InputError: as `line_chunks`.
    """
    for chunk in line_chunks(file, path, known):
        lines = [_text_row(line) for line in chunk.data[:-1].split(b"\n")]
        yield RawChunk(chunk.first_row, chunk.first_line, b"\n".join(lines) + b"\n", chunk.rows)


def _text_row(line: bytes) -> bytes:
    if not line.strip():
        return b""  # blank, and kept, so that lines keep their numbers
    try:
        return orjson.dumps({"text": line.removesuffix(b"\r").decode()})
    except UnicodeDecodeError as error:
        return bad_line("not_utf8", f"byte {error.start} of the line is not UTF-8 text; save the file as UTF-8")
