"""tokenize: rendered texts → ids and labels in Arrow shards, and the sequences that training sees.

One decision: a chunk of rendered rows becomes one shard, whatever the other chunks hold; what looks at all rows at
once (packing, order, statistics) works on their lengths alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pyarrow as pa

from registry.errors import InputError, Problem
from tasks.canonical import MARKS, read_table
from tasks.chunks import Chunk, ChunkCache, Made, link
from tasks.fetch import file_names
from tasks.fingerprint import fingerprints
from tasks.launch import ProgramFailed
from tasks.mixing import mixed
from tasks.packing import Sequences, blocks, cut_apart, one_by_one, pack
from tasks.program import ProgramError
from tasks.reading import BadRow, place
from tasks.rejects import SHOWN, Rejects
from tasks.render import TOKENIZER_FILES, rendered_chunks
from tasks.sequences import ORIGINS, TokenizedRows, describe_shards, shard_schema, write_index
from tasks.statistics import STATISTICS, describe_lengths
from tasks.steps import Input, Step, Work
from tasks.tokens import FASTOKENS, NOT_FAST, TOKENIZERS, Text, TextEncoder, TokenBatch, with_end
from tasks.workers import make_chunks

if TYPE_CHECKING:  # workers have no use for it, and it takes 0.2 s
    from registry.records import DataSettings

VERSION = 4  # a pair is one row in statistics.json, whatever texts it has
TOO_LONG, NOT_TRAINED = "too_long", "no_trained_tokens"
WHOLE = "whole"  # of `overlong`, for text that is measured
CHECKED_ROWS = 8  # of every chunk, encoded by both libraries: one row that differs, and the fast one is not used


def tokenize_step(
    stage: str,
    name: str,
    rendered: Step,
    base: Input,
    data: DataSettings,
    packing: bool,
    mixture: dict[str, Any] | None = None,
    whole: bool = False,
) -> Step:
    """The step that tokenizes rendered rows.

    Args:
        stage, name: where it stands in the plan.
        rendered: the render step.
        base: the model whose tokenizer.json is used.
        data: `cutoff_len`, `overlong`, `cut_answers`.
        packing: pack; evaluation never does.
        mixture: of the data sets, see `tasks.mixing.mixed`; None: every row once, in order.
        whole: plain text as it is, however long, and nothing put behind it: what is measured is the text.
    """
    identity: dict[str, Any] = {"cutoff_len": data.cutoff_len, "overlong": data.overlong, "packing": packing}
    if whole:
        identity = {"cutoff_len": None, "overlong": WHOLE, "packing": False}
    elif data.overlong == "truncate":
        identity["cut_answers"] = data.cut_answers
    if mixture:
        identity["mixture"] = mixture
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=rendered.label,
        identity=identity,
        inputs={"rendered": Input(rendered), "base": Input(base.source, TOKENIZER_FILES)},
        run="tasks.shards:tokenize",
        runtime=rendered.runtime,
        packages=("tokenizers", "fastokens", "pyarrow"),
    )


def shape_of(tokenize: Step) -> str:
    """The shape of the rows behind a tokenize step."""
    rendered = tokenize.inputs["rendered"].source
    assert isinstance(rendered, Step)
    return str(rendered.identity["shape"])


@dataclass(frozen=True)
class RowFitter:
    """Texts to tokens that fit; the step, `check` and `preview` share it."""

    encoder: TextEncoder
    cutoff_len: int | None
    """None: no text is too long."""
    overlong: str
    cut_answers: bool
    end: int | None
    """Id put behind every document of plain text; None for conversations, and for text that is measured."""
    trains: bool = True
    """Whether a row has to have something that is trained; a prompt has not."""

    @classmethod
    def make(cls, identity: dict[str, Any], base: Path, meta: dict[str, Any], library: str) -> RowFitter:
        """The fitter of a tokenize step.

        Args:
            identity: of the step.
            base: the model's folder.
            meta: what the render step says about its rows: `shape`, `control_tokens`.
            library: `fastokens` or `tokenizers`.

        Raises:
            InputError: tokenizer.json is not one, or a text model has no EOS.
        """
        encoder = TextEncoder(base, frozenset(meta["control_tokens"]), library)
        documents = meta["shape"] == "text" and identity["overlong"] != WHOLE
        end = _end_of_text(encoder, base) if documents else None
        cut = bool(identity.get("cut_answers"))
        return cls(encoder, identity["cutoff_len"], identity["overlong"], cut, end, meta["shape"] != "prompt")

    def fit(self, texts: list[Text]) -> tuple[TokenBatch, numpy.ndarray[Any, Any], list[BadRow | None]]:
        """Tokens, tokens before cutting, and for each text why it is left out (its tokens are then not to be used)."""
        batch = self.encoder.encode(texts)
        if self.end is not None:
            batch = with_end(batch, self.end)
        full = batch.lengths()
        refused: list[BadRow | None] = [None] * len(texts)
        too_long = (full > (self.cutoff_len or numpy.inf)) & (self.overlong != "split")
        if self.overlong == "truncate":
            batch = batch.cut(self._kept(batch))
        else:
            for number in numpy.flatnonzero(too_long).tolist():
                refused[number] = BadRow(TOO_LONG, f"{full[number]} tokens, cutoff_len is {self.cutoff_len}")
        for number in numpy.flatnonzero((batch.trained_tokens() == 0) & self.trains).tolist():
            what = "answer" if self.cut_answers else "whole answer"
            rule = f"no token of {'an' if self.cut_answers else 'a'} {what} is left within cutoff_len {self.cutoff_len}"
            rule = rule if self.cutoff_len else "a text of less than two tokens has nothing to predict"
            refused[number] = refused[number] or BadRow(NOT_TRAINED, rule)
        return batch, full, refused

    def _kept(self, batch: TokenBatch) -> numpy.ndarray[Any, Any]:
        """[rows] tokens to keep of each row: `cutoff_len`, or less, so that no answer loses its terminator."""
        assert self.cutoff_len is not None
        lengths = numpy.minimum(batch.lengths(), self.cutoff_len)
        if self.cut_answers:
            return lengths
        for row in numpy.flatnonzero(batch.lengths() > self.cutoff_len).tolist():
            marks = batch.trained[batch.offsets[row] : batch.offsets[row + 1]]
            cut = int(lengths[row])
            if marks[cut - 1] and marks[cut]:  # inside an answer: go back to the end of the one before
                outside = numpy.flatnonzero(~marks[:cut])
                before = numpy.flatnonzero(marks[: int(outside[-1])]) if len(outside) else outside
                lengths[row] = int(before[-1]) + 1 if len(before) else 0
        return lengths


class ChunkTokenizer:
    """Makes one shard of one rendered chunk."""

    def __init__(self, settings: dict[str, Any]) -> None:
        base = Path(settings["base"])
        self.fitter = RowFitter.make(settings["identity"], base, settings["meta"], settings["library"])
        self.shape = settings["meta"]["shape"]
        self.width = width(self.shape)

    def __call__(self, task: dict[str, Any], payload: bytes, target: Path) -> dict[str, Any]:
        table = read_table(Path(task["input"]))
        texts = texts_of(table)
        sample = texts[:: max(1, len(texts) // CHECKED_ROWS)][:CHECKED_ROWS]
        if self.fitter.encoder.library == FASTOKENS and not self.fitter.encoder.agrees(sample):
            raise ProgramError(NOT_FAST, "fastokens and tokenizers give different ids for a row")
        batch, full, refused = self.fitter.fit(texts)
        rows, lines = table["row"].to_pylist(), table["line"].to_pylist()
        left_out = []
        kept = numpy.ones(len(texts), numpy.bool_)
        for first in range(0, len(texts), self.width):  # both texts of a pair, or none
            bad = next((bad for bad in refused[first : first + self.width] if bad), None)
            if bad:
                kept[first : first + self.width] = False
                left_out.append([rows[first], lines[first], bad.reason, bad.detail])
        batch = batch.select(kept)
        place_of = numpy.array(rows, numpy.int64)[kept], numpy.array(lines, numpy.int32)[kept]
        marks = table[MARKS[self.shape]].combine_chunks().filter(pa.array(kept)) if self.shape in MARKS else None
        write_shard(target, batch, *place_of, self.shape, marks)
        return {
            "read": len(texts),
            "rows": int(kept.sum()),
            "tokens": len(batch.ids),
            "trained_tokens": int(batch.trained_tokens().sum()),
            "truncated": int((full[kept] > batch.lengths()).sum()),
            "left_out": left_out,
        }


def texts_of(table: pa.Table) -> list[Text]:
    """The texts of a rendered chunk."""
    columns = (table[name].to_pylist() for name in ("text", "spans", "typed"))
    return [Text(*values) for values in zip(*columns, strict=True)]


def width(shape: str) -> int:
    """Texts of one row, which follow each other: two of a pair, the preferred one first."""
    return 2 if shape == "preference" else 1


def write_shard(
    path: Path, batch: TokenBatch, rows: Any, lines: Any, shape: str = "chat", marks: pa.Array | None = None
) -> None:
    """Write texts as a shard: their tokens, where they come from, and their marks (see `canonical.MARKS`)."""
    offsets = pa.array(batch.offsets, pa.int32())
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (batch.ids, batch.labels())]
    schema = shard_schema(shape)
    columns = [*lists, pa.array(rows), pa.array(lines), *([] if marks is None else [marks])]
    record = pa.RecordBatch.from_arrays(columns, schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(record)


def _end_of_text(encoder: TextEncoder, base: Path) -> int:
    from tasks.jsonlines import read_object

    config = read_object(base / "tokenizer_config.json")
    token = config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    number = encoder.tokenizer.token_to_id(token) if token else None
    if number is None:
        rule = f"eos_token is {token!r}, which the tokenizer does not have; plain text needs one between documents"
        raise InputError(Problem(str(base / "tokenizer_config.json"), rule, "Set eos_token."))
    return int(number)


def tokenize(work: Work) -> dict[str, Any]:
    """Tokenize every chunk, then order and pack; finished chunks of earlier attempts and data sets are used again.

    Raises:
        InputError: a row too long under `overlong: error`, or no row left.
    """
    meta, chunks = rendered_chunks(work.inputs["rendered"])
    library = FASTOKENS
    try:
        made = _make(work, meta, chunks, library)
    except (ProgramError, ProgramFailed) as error:
        if error.kind != NOT_FAST:
            raise
        work.note(f"{error}; tokenizers does the work")
        library = TOKENIZERS
        made = _make(work, meta, chunks, library)
    rejects, total = Rejects(), 0
    files = file_names(work.inputs["rendered"], work.step.runtime)
    for chunk, shard in zip(chunks, made, strict=True):
        total += shard.report["read"] // width(meta["shape"])
        for row, line, reason, detail in shard.report["left_out"]:
            rejects.add(files[chunk["source"]][chunk["file"]], place(row, line), row, BadRow(reason, detail))
    kept = sum(shard.report["rows"] for shard in made)
    require_fitting(work.step, rejects, kept)
    if rejects.rows:
        work.note(f"left out {len(rejects.rows)} of {total} rows: {rejects.counts()}")
    rejects.write(work.output)
    filled = [(chunk, shard) for chunk, shard in zip(chunks, made, strict=True) if shard.report["rows"]]
    return _collect(work, meta, filled, {"left_out": rejects.counts(), "rows_read": total, "library": library})


def _make(work: Work, meta: dict[str, Any], chunks: list[dict[str, Any]], library: str) -> list[Made]:
    settings = {
        "identity": work.identity,
        "base": str(work.inputs["base"]),
        "meta": meta,
        "library": library,
    }
    constant = {
        "step": work.step.kind,
        "version": VERSION,
        "identity": {name: value for name, value in work.identity.items() if name not in ("packing", "mixture")},
        "meta": meta,
        "base": work.digests["base"],
        "library": library,
        "packages": work.packages,
    }
    folder = work.inputs["rendered"]
    key = fingerprints(constant)
    pending = [Chunk(key({"input": chunk["sha256"]}), {"input": str(folder / chunk["path"])}) for chunk in chunks]
    return make_chunks(
        "tasks.shards:ChunkTokenizer",
        settings,
        pending,
        ChunkCache(work.home, work.step.kind, work.rebuilding),
        work.step.runtime["workers"],
        work.counter([chunk["rows"] for chunk in chunks]),
        work.stop,
        work.step.runtime["dask"],
    )


def require_fitting(step: Step, rejects: Rejects, rows: int) -> None:
    """End a run that `cutoff_len` leaves without rows, or that wants none left out.

    Raises:
        InputError: a row too long under `overlong: error`, or no row but those.
    """
    compared = shape_of(step) in ("preference", "labelled")  # whose answers are never cut
    cure = "Raise cutoff_len" + ("." if compared else ", or set overlong: truncate to cut rows at the end.")
    if step.identity["overlong"] == "error":
        rejects.raise_if_any("tokenize", cure)
    if rows == 0:
        shown = [Problem(f"{r['file']}, {r['place']}", r["detail"]) for r in rejects.rows[:SHOWN]]
        count = len(rejects.rows)
        raise InputError([*shown, Problem("cutoff_len", f"none of {count} rows can be used", cure)], "tokenize")


def _collect(
    work: Work, meta: dict[str, Any], filled: list[tuple[dict[str, Any], Made]], counts: dict[str, Any]
) -> dict[str, Any]:
    """Shards, index and `statistics.json`."""
    made = [shard for _, shard in filled]
    names = [f"data-{number:05d}-of-{len(made):05d}.arrow" for number in range(len(made))]
    for name, shard in zip(names, made, strict=True):
        link(shard, work.output / name)
        work.known[name] = (shard.size, shard.sha256)
    describe_shards(work.output, names, [shard.sha256 for shard in made], meta["shape"])
    entries = [{name: chunk[name] for name in ("source", "file")} for chunk, _ in filled]
    (work.output / ORIGINS).write_text(json.dumps(entries), encoding="utf-8")
    tokenized = TokenizedRows(work.output)
    lengths = tokenized.lengths()
    wide = width(meta["shape"])
    sequences = _sequences(work.identity, lengths, _order(work, tokenized, entries, wide), wide)
    write_index(work.output, sequences)
    count = len(sequences.offsets) - 1
    statistics = {
        "rows": len(lengths) // wide,
        "sequences": count,
        **{name: sum(shard.report[name] for shard in made) for name in ("tokens", "trained_tokens", "truncated")},
        **describe_lengths(lengths),
        "filled": None,
        **counts,
    }
    if work.identity["packing"]:
        statistics["filled"] = round(int(sequences.lengths.sum()) / (count * work.identity["cutoff_len"]), 4)
    (work.output / STATISTICS).write_text(json.dumps(statistics, indent=1), encoding="utf-8")
    return {name: value for name, value in statistics.items() if name != "histogram"}


def _order(work: Work, tokenized: TokenizedRows, entries: list[dict[str, Any]], wide: int) -> Any:
    """[texts of an epoch] which texts are seen, in order; the two of a pair stay together."""
    mixture = work.identity.get("mixture")
    if mixture is None:
        return numpy.arange(len(tokenized))
    counts = numpy.diff(tokenized.first) // wide
    sources = numpy.repeat([entry["source"] for entry in entries], counts)
    seen = mixed([numpy.flatnonzero(sources == number) for number in range(len(mixture["repeats"]))], mixture)
    return (seen[:, None] * wide + numpy.arange(wide)).reshape(-1)


def _sequences(identity: dict[str, Any], lengths: Any, rows: Any, wide: int) -> Sequences:
    lengths = lengths[rows]
    if identity["overlong"] == "split":
        return (blocks if identity["packing"] else cut_apart)(rows, lengths, identity["cutoff_len"])
    if identity["packing"]:
        return pack(rows, lengths, identity["cutoff_len"])
    return one_by_one(rows, lengths, wide)
