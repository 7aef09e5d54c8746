"""What reading gives: rows, rows that cannot be read, and chunks of rows that are not parsed yet.

One decision: a chunk is JSON lines, whatever the file was. Cutting a file into chunks is cheap and done in order;
parsing them is the work, and each can be parsed by anybody, or not at all when its bytes were seen before.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from blake3 import blake3

from registry.errors import InputError, Problem

CHUNK_ROWS = 2000
CHUNK_BYTES = 8_000_000
MAX_ROW_BYTES = 128_000_000  # a longer one is no row but a file of another kind; it bounds the memory of reading
MAX_KEPT_BYTES = 100_000  # of a row left out
CHANGED_CURE = "Run again when nobody writes to it; touch it if its time was set back."
BAD = "\0bad row"  # marks the line of a row that could not be made one; it is no object, so no row of any file's own


@dataclass(frozen=True)
class BadRow:
    """A row left out, and why. `reason` is a short code to count by, `detail` a sentence."""

    reason: str
    detail: str


class RawRow(NamedTuple):
    """One row of a file."""

    row: int
    """0-based number of the row in its file; blank lines do not count."""
    line: int
    """1-based line it is on; 0 for files without lines."""
    value: dict[str, Any] | BadRow
    data: bytes
    """Its JSON."""

    @property
    def place(self) -> str:
        """For people: `line 3` or `row 2`."""
        return place(self.row, self.line)

    def text(self) -> str:
        """Its JSON as text, whatever it is, and not longer than a page: for a file of rows left out."""
        return self.data[:MAX_KEPT_BYTES].decode("utf-8", errors="replace")


def place(row: int, line: int) -> str:
    """Where a row is, for people.

    >>> place(0, 3), place(0, 0)
    ('line 3', 'row 0')
    """
    return f"line {line}" if line else f"row {row}"


class Stretch(NamedTuple):
    """Lines that lie in a file and are not read before they are wanted."""

    path: Path
    offset: int
    size: int
    digest: str
    """BLAKE3 of them, the last one ended."""

    def read(self) -> bytes:
        """The lines.

        Raises:
            InputError: they are not there any more.
        """
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) == self.size - 1:
            data += b"\n"
        if blake3(data).hexdigest() != self.digest:
            raise InputError(Problem(str(self.path), "other bytes than when it was looked at", CHANGED_CURE))
        return data


@dataclass(frozen=True)
class RawChunk:
    """Consecutive rows of a file, not parsed yet."""

    first_row: int
    """0-based number of its first row in the file; blank lines do not count."""
    first_line: int
    """1-based line its data begins on; 0 for files without lines, whose places are `row N`."""
    lines: bytes | Stretch
    """JSON lines, the last one ended too."""
    rows: int
    """How many there are."""

    @property
    def data(self) -> bytes:
        """Its JSON lines; read now where they lie in a file.

        Raises:
            InputError: the file has changed meanwhile.
        """
        return self.lines.read() if isinstance(self.lines, Stretch) else self.lines

    def digest(self) -> str:
        """BLAKE3 of its data as 64 hex digits."""
        return self.lines.digest if isinstance(self.lines, Stretch) else blake3(self.lines).hexdigest()


class ChunkBuilder:
    """Rows that come one by one, to chunks.

    A chunk ends behind `CHUNK_ROWS` rows or the row that reaches `CHUNK_BYTES`: where it ends depends on nothing that
    comes later, so rows appended to a file leave the chunks before them as they were.
    """

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._size, self._row = 0, 0

    def add(self, line: bytes) -> RawChunk | None:
        """Take the JSON of a row, without line ends; the chunk that it completes."""
        self._lines.append(line)
        self._size += len(line) + 1
        return self.close() if len(self._lines) == CHUNK_ROWS or self._size >= CHUNK_BYTES else None

    def close(self) -> RawChunk | None:
        """The rows that are left."""
        if not self._lines:
            return None
        chunk = RawChunk(self._row, 0, b"\n".join(self._lines) + b"\n", len(self._lines))
        self._row += len(self._lines)
        self._lines, self._size = [], 0
        return chunk


def bad_line(reason: str, detail: str) -> bytes:
    """The line of a row that could not be made one."""
    return orjson.dumps([BAD, reason, detail])
