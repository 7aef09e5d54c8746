"""Where a file of lines was cut into chunks, remembered, so that what is in it still need not be cut again.

One decision: what is remembered is only a hint where to look. A cut begins somewhere and ends where its own bytes say,
so "these bytes are one whole chunk of so many lines and rows" holds wherever they are found; and that they are these
is proved by their BLAKE3 each time, never taken from the file's name, size or times.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from blake3 import blake3

from tasks.digests import DigestMemory
from tasks.raw_rows import CHUNK_BYTES, CHUNK_ROWS

RULE = [CHUNK_ROWS, CHUNK_BYTES]  # what was cut by another rule is not looked at


class Cut(NamedTuple):
    """Consecutive lines of a file, as they stand."""

    data: bytes
    """All of them ended; the end of the file's last line may be added."""
    lines: int
    rows: int
    """Lines that are not blank."""
    whole: bool = True
    """Whatever comes behind it in the file, it ends where it does."""
    digest: str | None = None
    """BLAKE3 of the data, where it is known."""


class Cuts:
    """The cuts of one file: those of the last time it was read, and those of now.

    Args:
        memory: where they are kept.
        path: the file, not compressed.
    """

    def __init__(self, memory: DigestMemory, path: Path) -> None:
        self._memory, self._path = memory, path
        self._kept = memory.cuts(path)
        kept = json.loads(self._kept) if self._kept else {"rule": None}
        pieces = kept["pieces"] if kept["rule"] == RULE else []
        self._earlier = {offset: (size, lines, rows, digest) for offset, size, lines, rows, digest in pieces}
        self._now: list[tuple[int, int, int, int, str | None]] = []

    def earlier(self, file: BinaryIO, offset: int) -> Cut | None:
        """The cut that begins at an offset, if there was one the last time and its bytes are the same."""
        size, lines, rows, digest = self._earlier.get(offset, (0, 0, 0, ""))
        if not 0 < size <= os.fstat(file.fileno()).st_size - offset:
            return None
        data = os.pread(file.fileno(), size, offset)  # the file's own position stays
        return Cut(data, lines, rows, digest=digest) if blake3(data).hexdigest() == digest else None

    def add(self, offset: int, cut: Cut) -> Cut:
        """Take note of a cut that begins at an offset; the same, with its digest."""
        cut = cut._replace(digest=cut.digest or blake3(cut.data).hexdigest())
        if cut.whole:
            self._now.append((offset, len(cut.data), cut.lines, cut.rows, cut.digest))
        return cut

    def keep(self) -> None:
        """Remember the cuts of now; to be called when the file has been read to its end."""
        kept = json.dumps({"rule": RULE, "pieces": self._now})
        if kept != self._kept:
            self._memory.keep_cuts(self._path, kept)
