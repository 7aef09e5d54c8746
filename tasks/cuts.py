"""Where a file of lines was cut into chunks, remembered, so that what is in it still need not be cut again.

One decision: what is remembered is only a hint where to look. A cut begins somewhere and ends where its own bytes say,
so "these bytes are one whole chunk of so many lines and rows" holds wherever they are found; and that they are these
is proved by their BLAKE3, never taken from the file's name, size or times. The list of all cuts then is what the file
holds, and the BLAKE3 of the list is the file's digest: one pass over the file both finds out what is new in it and
says what it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from blake3 import blake3

from tasks.digests import CACHED_BYTES, DigestMemory
from tasks.raw_rows import CHUNK_BYTES, CHUNK_ROWS, Stretch

RULE = [CHUNK_ROWS, CHUNK_BYTES]  # what was cut by another rule is not looked at


class Cut(NamedTuple):
    """Consecutive lines of a file, as they stand."""

    data: bytes | Stretch
    """All of them ended; the end of the file's last line may be added."""
    lines: int
    rows: int
    """Lines that are not blank."""
    whole: bool = True
    """Whatever comes behind it in the file, it ends where it does."""

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return self.data.size if isinstance(self.data, Stretch) else len(self.data)


class Piece(NamedTuple):
    """What is remembered of a cut; the names are those of `Cut`."""

    offset: int
    size: int
    lines: int
    rows: int
    whole: bool
    digest: str
    """BLAKE3 of the data."""

    def cut(self, path: Path) -> Cut:
        """The cut, not read."""
        return Cut(Stretch(path, self.offset, self.size, self.digest), self.lines, self.rows, self.whole)

    def is_in(self, file: BinaryIO) -> bool:
        """Whether the bytes in the file are its own; the file's position stays."""
        digest, end = blake3(), self.offset + self.size
        for place in range(self.offset, end, CACHED_BYTES):
            data = os.pread(file.fileno(), min(CACHED_BYTES, end - place), place)
            if not data:
                return False
            digest.update(data)
        return digest.hexdigest() == self.digest


class Cuts:
    """The cuts of one file: those of the last time it was read to its end, and those of now.

    Args:
        memory: where they are kept.
        path: the file, not compressed.
    """

    def __init__(self, memory: DigestMemory, path: Path) -> None:
        self._memory, self._path = memory, path
        self._kept, self._earlier = memory.cuts(path), dict[int, Piece]()
        if self._kept:
            kept = json.loads(self._kept)
            if kept["rule"] == RULE:
                self._earlier = {piece[0]: Piece(*piece) for piece in kept["pieces"]}
            else:
                self._kept = None
        self._now: list[Piece] = []

    def of(self, digest: str) -> list[Cut] | None:
        """All cuts of the file when its digest was this, not read; None where the last time it was another."""
        if self._kept is None or blake3(self._kept.encode()).hexdigest() != digest:
            return None
        return [piece.cut(self._path) for piece in self._earlier.values()]

    def earlier(self, file: BinaryIO, offset: int) -> Cut | None:
        """The whole cut that begins at an offset, if there was one the last time and its bytes are the same."""
        piece = self._earlier.get(offset)
        return piece.cut(self._path) if piece and piece.whole and piece.is_in(file) else None

    def add(self, offset: int, cut: Cut) -> None:
        """Take note of a cut that begins at an offset."""
        digest = cut.data.digest if isinstance(cut.data, Stretch) else blake3(cut.data).hexdigest()
        self._now.append(Piece(offset, cut.size, cut.lines, cut.rows, cut.whole, digest))

    def keep(self, end: int) -> str:
        """Remember the cuts of now, which are all there are.

        Args:
            end: bytes of the file.

        Returns:
            The file's digest: equal for equal bytes, whatever was remembered before.
        """
        kept = json.dumps({"rule": RULE, "end": end, "pieces": self._now})
        if kept != self._kept:
            self._memory.keep_cuts(self._path, kept)
        return blake3(kept.encode()).hexdigest()
