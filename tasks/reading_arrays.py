"""A JSON array to chunks, through a sliding window.

One decision: elements are found by the standard library's scanner, which says where a value ends, and their own text
is passed on; the array is never in memory, and what is in it is parsed once more where rows are made.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from registry.errors import InputError, Problem
from tasks.raw_rows import MAX_ROW_BYTES, ChunkBuilder, RawChunk
from tasks.reading_files import too_long

BLOCK_BYTES = 2_000_000
MARGIN = 16  # characters: an error so near the end of the window can be a word or an escape that is cut there
SPACE = re.compile(r"[ \t\n\r]*")
SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)  # numbers are not looked at


def array_chunks(file: BinaryIO, path: Path) -> Iterator[RawChunk]:
    """The elements of a JSON array, line ends between their parts replaced by spaces.

    Raises:
        InputError: the file is not one whole array, or not UTF-8.
    """
    window, chunks = _Window(file, path), ChunkBuilder()
    for text in window.elements():
        chunk = chunks.add(text.replace("\n", " ").replace("\r", " ").encode())
        if chunk:
            yield chunk
    chunk = chunks.close()
    if chunk:
        yield chunk


class _Window:
    """A part of the file's text that slides over it."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._place = "", 0
        self._rest = b""  # of a character cut at the end of a block
        self._bytes_before = 0
        self._lines_before = 0
        self._row = 0
        self._at_end = False

    def elements(self) -> Iterator[str]:
        """The text of each element, in order."""
        self._next()
        self._place += 1  # the bracket, which the caller has seen
        if self._next() != "]":
            yield self._element()
            while self._next() == ",":
                self._place += 1
                self._next()
                self._row += 1
                yield self._element()
        if self._next() != "]":
            raise self._invalid("Expecting ',' delimiter", self._place)
        self._place += 1
        if self._next():
            raise self._invalid("Extra data", self._place)

    def _next(self) -> str:
        """Go to the next character that is no white space; "" at the end of the file."""
        while True:
            match = SPACE.match(self._text, self._place)
            self._place = match.end() if match else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if self._at_end:
                return ""
            self._slide()

    def _element(self) -> str:
        while True:
            try:
                _, end = SCANNER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - MARGIN
                if self._at_end or not cut:
                    raise self._invalid(error.msg, error.pos) from error
            except RecursionError as error:
                raise InputError(Problem(str(self._path), f"not readable JSON: {error}", "Mend the file.")) from error
            else:
                if end < len(self._text) or self._at_end:
                    start, self._place = self._place, end
                    return self._text[start:end]
            if len(self._text) - self._place > MAX_ROW_BYTES:
                raise too_long(f"{self._path}, row {self._row}")
            self._slide()

    def _slide(self) -> None:
        """Drop what was read; read a block, or as much again as is left, so that a long element is not read often."""
        self._lines_before += self._text.count("\n", 0, self._place)
        kept, self._place = self._text[self._place :], 0
        block = self._file.read(max(BLOCK_BYTES, len(kept)))
        if not self._bytes_before and not kept and not self._rest:
            found = block.removeprefix(codecs.BOM_UTF8)
            self._bytes_before, block = len(block) - len(found), found
        self._at_end = not block
        data = self._rest + block
        try:
            more, used = codecs.utf_8_decode(data, "strict", self._at_end)
        except UnicodeDecodeError as error:
            rule = f"not UTF-8 text at byte {self._bytes_before + error.start}"
            raise InputError(Problem(str(self._path), rule, "Save the file as UTF-8.")) from error
        self._bytes_before += used
        self._rest, self._text = data[used:], kept + more

    def _invalid(self, message: str, place: int) -> InputError:
        line = self._lines_before + self._text.count("\n", 0, place) + 1
        return InputError(
            Problem(f"{self._path}:{line}", f"not valid JSON: {message}, in row {self._row}", "Mend the file.")
        )
