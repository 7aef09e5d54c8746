"""fetch: source files → canonical rows in Arrow chunks.

One decision: a chunk is a fixed number of source rows under a declared schema, so what it holds depends on its own
rows only, whatever else the file contains; its key is made of their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.data_sources import DataSource
from registry.errors import InputError, Problem
from tasks.canonical import to_table, write_table
from tasks.chunks import Chunk, ChunkCache, Made, link
from tasks.digests import DigestMemory
from tasks.download import download_step
from tasks.fingerprint import fingerprints
from tasks.formats import Form, converter
from tasks.keeping_back import kept_back_rows, share_out
from tasks.raw_rows import Stretch
from tasks.reading import BadRow, RawChunk, chunk_rows, file_digest, place
from tasks.rejects import Rejects
from tasks.source_rows import SourceFiles, convert, converted_rows, source_list
from tasks.steps import Input, Step, Work
from tasks.workers import make_chunks

if TYPE_CHECKING:  # workers have no use for it, and it takes 0.2 s
    from registry.records import DataSettings, RuntimeSettings

VERSION = 3  # five shapes, every kind of file, rows in chunks of their own
ROWS, KEPT_BACK = "rows", "kept_back"
FILES = "files.json"
SKIP_CURE = "Mend the rows, or set bad_rows: skip to leave them out."


def fetch_step(
    stage: str,
    name: str,
    sources: tuple[DataSource, ...],
    data: DataSettings,
    runtime: RuntimeSettings,
    shape: str,
    seed: int,
    memory: DigestMemory,
    split: bool,
) -> Step:
    """The step that reads data sets.

    Args:
        stage, name: where it stands in the plan.
        sources: the data sets, in order.
        data: `max_samples`, `val_size`, `bad_rows`.
        runtime: `preprocessing_num_workers` and `preprocessing_dask`.
        shape: one of `tasks.formats.SHAPES`.
        seed: of the choice of rows kept back.
        memory: digests of the files; a file counts by its bytes, not by its name.
        split: keep rows back for evaluation, as `val_size` says.
    """
    identity: dict[str, Any] = {
        "sources": [_described(source, data, memory) for source in sources],
        "shape": shape,
        "bad_rows": data.bad_rows,
        "bad_rows_limit": data.bad_rows_limit,
    }
    if split and data.val_size:
        identity |= {"val_size": data.val_size, "seed": seed}
    downloads = {
        f"source{number}": Input(download_step(stage, f"download:{source.name}", source))
        for number, source in enumerate(sources)
        if source.remote
    }
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label="-".join(source.name for source in sources),
        identity=identity,
        inputs=downloads,
        run="tasks.fetch:fetch",
        runtime={
            "names": [source.name for source in sources],
            "files": [[str(file) for file in source.files] for source in sources],
            "workers": runtime.preprocessing_num_workers,
            "dask": runtime.preprocessing_dask,
        },
        packages=("pyarrow", "orjson"),
    )


def _described(source: DataSource, data: DataSettings, memory: DigestMemory) -> dict[str, Any]:
    limits = [limit for limit in (data.max_samples, source.num_samples, source.max_rows) if limit is not None]
    return {
        "files": [file_digest(file, memory) for file in source.files],
        "formatting": source.formatting,
        "ranking": source.ranking,
        "columns": dict(source.columns),
        "tags": dict(source.tags),
        "slice": asdict(source.slice) if source.slice else None,
        "most_rows": min(limits, default=None),
    }


class ChunkReader:
    """Makes one chunk of canonical rows of one chunk of a file."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.shape = settings["shape"]
        self.converters = [converter(Form(**form), self.shape) for form in settings["forms"]]

    def __call__(self, task: dict[str, Any], payload: bytes, target: Path) -> dict[str, Any]:
        chunk = RawChunk(task["first_row"], task["first_line"], payload, task["rows"])
        stop = None if task["take"] is None else task["skip"] + task["take"]
        raws = chunk_rows(chunk)[task["skip"] : stop]
        rows, left_out = [], []
        convert_row = self.converters[task["form"]]
        for raw in raws:
            found = convert(raw, convert_row)
            if isinstance(found, BadRow):
                left_out.append([raw.row, raw.line, found.reason, found.detail, raw.text()])
                continue
            for row in found:
                row["row"], row["line"] = raw.row, raw.line
                rows.append(row)
        write_table(target, to_table(rows, self.shape))
        return {"read": len(raws), "used": len(raws) - len(left_out), "rows": len(rows), "left_out": left_out}


def fetch(work: Work) -> dict[str, Any]:
    """Read every source, write `rows/` (and `kept_back/`), report rows left out.

    Raises:
        InputError: a bad row under `bad_rows: fail`, too many of them, or nothing left.
    """
    sources = source_list(work.step, work.inputs, DigestMemory(work.home.digests))
    forms = [source.form() for source in sources]
    for sentence in found_forms(work.step, sources, forms):
        work.note(sentence)
    origins: list[tuple[int, int]] = []  # of each chunk: numbers of the source and of its file
    made = make_chunks(
        "tasks.fetch:ChunkReader",
        {"shape": work.identity["shape"], "forms": [asdict(form) for form in forms]},
        _chunks(work, sources, forms, origins),
        ChunkCache(work.home, work.step.kind, work.rebuilding),
        work.step.runtime["workers"],
        _Counter(work),
        work.stop,
        work.step.runtime["dask"],
    )
    rejects = Rejects()
    for (source, file), chunk in zip(origins, made, strict=True):
        for row, line, reason, detail, text in chunk.report["left_out"]:
            name = str(sources[source].files[file])
            rejects.add(name, place(row, line), row, BadRow(reason, detail), text)
    counts = {name: sum(chunk.report[name] for chunk in made) for name in ("read", "used", "rows")}
    files = [[str(file) for file in source.files] for source in sources]
    require_rows(work.step, [file for names in files for file in names], rejects, counts["read"], counts["rows"])
    rejects.write(work.output, work.identity["bad_rows"] == "quarantine")
    (work.output / "report" / FILES).write_text(json.dumps(files, ensure_ascii=False), encoding="utf-8")
    kept = [(*origin, chunk) for origin, chunk in zip(origins, made, strict=True) if chunk.report["rows"]]
    answer: dict[str, Any] = {"rows_read": counts["read"], "rows": counts["rows"], "left_out": rejects.counts()}
    if "val_size" in work.identity:
        kept, back = share_out(work, kept, counts["rows"])
        answer["kept_back"] = sum(chunk.report["rows"] for _, _, chunk in back)
        answer["rows"] -= answer["kept_back"]
        _write_chunks(work, KEPT_BACK, back)
    _write_chunks(work, ROWS, kept)
    return answer


def found_forms(step: Step, sources: list[SourceFiles], forms: list[Form]) -> Iterator[str]:
    """What was found out about each data set that nobody told, and what is made of rows of another shape."""
    for name, source, form in zip(step.runtime["names"], sources, forms, strict=True):
        change = form.change(source.shape)
        if source.settings["formatting"] is None or change:
            yield f"{name}: {form.sentence()}" + (f"; {change}" if change else "")


class _Counter:
    """Counts rows on; how many there will be is not known before the files have been read."""

    def __init__(self, work: Work) -> None:
        self.work, self.rows = work, 0

    def __call__(self, made: Made) -> None:
        self.rows += made.report["read"]
        self.work.progress(self.rows, 0, "rows")


def _chunks(
    work: Work, sources: list[SourceFiles], forms: list[Form], origins: list[tuple[int, int]]
) -> Iterator[Chunk]:
    for number, (source, form) in enumerate(zip(sources, forms, strict=True)):
        constant = {
            "step": work.step.kind,
            "version": VERSION,
            "shape": source.shape,
            "form": asdict(form),
            "packages": work.packages,
        }
        key = fingerprints(constant)
        for file, raw, skip, take in source.chunks():
            origins.append((number, file))
            task = {
                "first_row": raw.first_row,
                "first_line": raw.first_line,
                "rows": raw.rows,
                "skip": skip,
                "take": take,
            }
            given = {"source": raw.lines.read} if isinstance(raw.lines, Stretch) else {"payload": raw.lines}
            yield Chunk(key(task | {"data": raw.digest()}), task | {"form": number}, **given)


def count_usable_rows(step: Step) -> tuple[int, dict[str, int]]:
    """Usable rows of a fetch step whose files are here, and reason → rows left out, without writing anything.

    Raises:
        InputError: as `fetch` does.
    """
    rejects, read, usable = Rejects(), 0, 0
    for _, file, raw, found in converted_rows(step, {}):
        read += 1
        if isinstance(found, BadRow):
            rejects.add(str(file), place(raw.row, raw.line), raw.row, found)
        else:
            usable += len(found)
    files = [file for names in step.runtime["files"] for file in names]
    require_rows(step, files, rejects, read, usable)
    if "val_size" in step.identity:
        kept_back_rows(step.identity["val_size"], usable)
    return usable, rejects.counts()


def require_rows(step: Step, files: Iterable[str], rejects: Rejects, read: int, usable: int) -> None:
    """End a run over rows that cannot be used, as `bad_rows` says.

    Raises:
        InputError: a bad row under `bad_rows: fail`, more than `bad_rows_limit` of them, or no row left.
    """
    if step.identity["bad_rows"] == "fail":
        rejects.raise_if_any("data", SKIP_CURE)
    if usable == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.counts().items())
        rule = f"no usable row: {reasons or 'the files hold no rows'}"
        named = ", ".join(dict.fromkeys(files)) or ", ".join(step.runtime["names"])
        raise InputError(Problem(named, rule, "A data set needs at least one."))
    rejects.raise_above(step.identity["bad_rows_limit"], read, "data")


def _write_chunks(work: Work, folder: str, chunks: list[tuple[int, int, Made]]) -> None:
    """Link finished chunks into `folder` of the output, and list them in `<folder>.json`."""
    (work.output / folder).mkdir()
    entries = []
    for number, (source, file, chunk) in enumerate(chunks):
        path = f"{folder}/{number:05d}.arrow"
        link(chunk, work.output / path)
        work.known[path] = (chunk.size, chunk.sha256)
        rows = chunk.report["rows"]
        entries.append({"path": path, "sha256": chunk.sha256, "rows": rows, "source": source, "file": file})
    (work.output / f"{folder}.json").write_text(json.dumps(entries), encoding="utf-8")


def file_names(folder: Path, runtime: Mapping[str, Any]) -> list[list[str]]:
    """For each data set the names of its files, for reports: as they are called now, or as they were downloaded.

    Args:
        folder: the fetch artifact.
        runtime: of the step that reads it.
    """
    made_of: list[list[str]] = json.loads((folder / "report" / FILES).read_text(encoding="utf-8"))
    return [now or then for now, then in zip(runtime["files"], made_of, strict=True)]
