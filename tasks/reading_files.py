"""Data files as streams of bytes: compression undone, damage said.

One decision: a damaged compressed file is one error of the file. Rows before the damage would be read, but nobody
could say how many are missing behind it.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from registry.data_files import KNOWN_SUFFIXES, kind_of
from registry.errors import InputError, Problem
from tasks.raw_rows import MAX_ROW_BYTES

NAMES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".xz": lzma.LZMAFile,
    ".zst": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
}


def require_kind(path: Path) -> tuple[str, str]:
    """Kind and compression of a data file, e.g. `.jsonl` and `.gz`.

    Raises:
        InputError: it is of no kind that can be read.
    """
    kind = kind_of(path.name)
    if kind is None:
        raise InputError(Problem(str(path), f"not one of {KNOWN_SUFFIXES}", "Convert it to JSON lines."))
    return kind


def open_data(path: Path) -> BinaryIO:
    """The bytes of a data file, decompressed while they are read.

    Raises:
        InputError: here or while reading: it is not a whole compressed file of its kind.
        OSError: it cannot be read.
    """
    compression = require_kind(path)[1]
    return io.BufferedReader(_Inflated(path, compression), 1 << 20) if compression else open(path, "rb")


class _Inflated(io.RawIOBase):
    """A decompressing stream whose errors name the file and the cure."""

    def __init__(self, path: Path, compression: str) -> None:
        super().__init__()
        self._path, self._compression = path, compression
        self._stream: Any = OPEN[compression](path)  # closed with this one

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            return int(self._stream.readinto(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the disk's trouble, not the file's
            rule = f"not a whole {NAMES[self._compression]} file: {error}"
            cure = "Copy or download it again, or rename it if it is not compressed."
            raise InputError(Problem(str(self._path), rule, cure)) from error

    def close(self) -> None:
        self._stream.close()
        super().close()


def too_long(where: str) -> InputError:
    """The error for a row that is none."""
    rule = f"a row of more than {MAX_ROW_BYTES / 1e6:,.0f} MB"
    return InputError(Problem(where, rule, "Split it, or check that the file is what its name says."))
