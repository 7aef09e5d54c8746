"""The rows of data sets, read in order: files, range of rows, form.

One decision: how a source is read (which rows, in which form) is settled here once, from its entry in the fetch step's
identity; the step, `check` and `preview` all read through this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.data_sources import RowSlice
from registry.errors import InputError
from tasks.cuts import Cut
from tasks.digests import DigestMemory
from tasks.download import downloaded_files
from tasks.formats import Converter, Form, converter, declared, detect, misfit, unknown_columns
from tasks.reading import BadRow, RawChunk, RawRow, chunk_rows, count_rows, known_cuts, raw_chunks
from tasks.steps import Step


@dataclass(frozen=True)
class SourceFiles:
    """One data set, ready to be read."""

    files: list[Path]
    settings: dict[str, Any]
    """Its entry in the step's identity."""
    shape: str
    memory: DigestMemory | None = None
    """Of where its files were cut when their digests were computed; None: they are cut now."""

    def form(self) -> Form:
        """How its rows are read: as declared, or found from the first row that can be read.

        Raises:
            InputError: the columns are those of no known form, or not of one this shape can be made of.
        """
        formatting, ranking, tags = (self.settings[name] for name in ("formatting", "ranking", "tags"))
        if formatting is not None:
            columns = {name: column for name, column in self.settings["columns"].items() if column}
            where = ", ".join(map(str, self.files))
            return _fitting(declared(formatting, ranking, columns, tags, self.shape), self.shape, where)
        for file in self.files:
            for raw in (row for chunk in raw_chunks(file) for row in chunk_rows(chunk)):
                if isinstance(raw.value, BadRow):
                    continue
                found, where = detect(raw.value, self.shape), f"{file}, {raw.place}"
                if found is None:
                    raise InputError(unknown_columns(raw.value, self.shape, where))
                return _fitting(found, self.shape, where)
        return declared("alpaca", False, {}, {}, "chat")  # no readable row: every one of them is reported

    def wanted(self) -> tuple[int, int | None]:
        """First row and row behind the last, over all files; None: to the end."""
        given, most = self.settings["slice"], self.settings["most_rows"]
        start, stop = 0, None
        if given:
            rows = RowSlice(**given)
            if rows.needs_total:
                start, stop = rows.bounds(self._total())
            else:
                start, stop = rows.start or 0, rows.stop
        if most is not None:
            stop = start + most if stop is None else min(stop, start + most)
        return start, stop

    def _total(self) -> int:
        return sum(count_rows(file, self._known(number)) for number, file in enumerate(self.files))

    def _known(self, number: int) -> list[Cut] | None:
        """Where a file is to be cut to have the digest in the step's identity."""
        digests = self.settings["files"]  # none of files that were downloaded
        return known_cuts(self.files[number], digests[number], self.memory) if self.memory and digests else None

    def chunks(self) -> Iterator[tuple[int, RawChunk, int, int | None]]:
        """(number of the file, chunk, rows to leave out at its start, rows to take of the others or None for all)."""
        start, stop = self.wanted()
        before = 0
        for number, file in enumerate(self.files):
            total = 0
            for chunk in raw_chunks(file, self._known(number)):
                first = before + chunk.first_row
                if stop is not None and first >= stop:
                    return
                total = chunk.first_row + chunk.rows
                if first + chunk.rows <= start:
                    continue
                skip = max(0, start - first)
                take = None if stop is None or first + chunk.rows <= stop else stop - first - skip
                yield number, chunk, skip, take
            before += total


def _fitting(form: Form, shape: str, where: str) -> Form:
    """A form, if rows of the shape can be made of it.

    Raises:
        InputError: they cannot.
    """
    problem = misfit(form, shape, where)
    if problem:
        raise InputError(problem)
    return form


def source_list(step: Step, inputs: Mapping[str, Path], memory: DigestMemory | None = None) -> list[SourceFiles]:
    """The data sets of a fetch step.

    Args:
        step: the step.
        inputs: folders of its download steps.
        memory: of where files were cut into chunks.
    """
    found = []
    for number, settings in enumerate(step.identity["sources"]):
        local = [Path(file) for file in step.runtime["files"][number]]
        files = local or downloaded_files(inputs[f"source{number}"])
        found.append(SourceFiles(files, settings, step.identity["shape"], memory))
    return found


def convert(raw: RawRow, convert_row: Converter) -> list[dict[str, Any]] | BadRow:
    """The canonical rows of a raw one, or why there are none."""
    return raw.value if isinstance(raw.value, BadRow) else convert_row(raw.value)


def converted_rows(
    step: Step, inputs: Mapping[str, Path]
) -> Iterator[tuple[int, Path, RawRow, list[dict[str, Any]] | BadRow]]:
    """Every row of a fetch step's sources: number of the source, file, raw row, and its canonical rows or why none."""
    for number, source in enumerate(source_list(step, inputs)):
        convert_row = converter(source.form(), source.shape)
        for file, chunk, skip, take in source.chunks():
            for raw in chunk_rows(chunk)[skip : None if take is None else skip + take]:
                yield number, source.files[file], raw, convert(raw, convert_row)
