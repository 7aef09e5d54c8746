"""tokenize: text and spans → ids and labels in Arrow shards that `datasets.load_from_disk` opens.

One decision: ids come from the published tokenizer.json through `tokenizers`, not from a rebuilt tokenizer, and
the label of a token follows from its own offsets: a token that begins inside a span is trained, one that begins
before it is not. Ids and labels grow together in `encode_row`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Encoding, Tokenizer

from registry.errors import InputError, Problem
from registry.records import DataSettings
from tasks.digests import sha256_file
from tasks.fetch import read_chunks, write_chunk
from tasks.fingerprint import fingerprint
from tasks.jsonlines import read_object
from tasks.packing import pack
from tasks.reading import BadRow
from tasks.rejects import SHOWN, Rejects
from tasks.render import TOKENIZER_FILES
from tasks.steps import Input, Step, Work

VERSION = 1  # first form
TOO_LONG = "too_long"
IGNORED = -100  # the label of a token that is not trained
BATCH = 256  # rows per call into the tokenizer
ROW_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("full_length", pa.int32()),
        ("source", pa.int32()),
        ("row", pa.int64()),
    ]
)
SHARD_SCHEMA = pa.schema(
    [(name, pa.list_(pa.int32())) for name in ("input_ids", "labels", "seq_lengths", "sources")]
    + [("rows", pa.list_(pa.int64()))]
)
SHARD_SEQUENCES = 20_000


def tokenize_step(stage: str, name: str, rendered: Step, base: Input, data: DataSettings, packing: bool) -> Step:
    """The step that tokenizes rendered rows.

    Args:
        stage, name: where it stands in the plan.
        rendered: the render step.
        base: the model whose tokenizer.json is used.
        data: `cutoff_len`, `overlong`.
        packing: pack; evaluation never does.
    """
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=rendered.label,
        identity={"cutoff_len": data.cutoff_len, "overlong": data.overlong, "packing": packing},
        inputs={"rendered": Input(rendered, ("rows/*",)), "base": Input(base.source, TOKENIZER_FILES)},
        run="tasks.shards:tokenize",
        runtime={"files": rendered.runtime["files"]},
        packages=("tokenizers", "pyarrow"),
    )


def encode_row(encoding: Encoding, text: str, spans: list[int], prefix: list[int]) -> tuple[list[int], list[int]]:
    """Ids and labels of one row.

    Args:
        encoding: of the whole text, without added special tokens.
        text: the row.
        spans: flat byte offsets `[start, end, start, end, …]` of what is trained.
        prefix: ids put in front (a BOS the template does not write); never trained.

    Returns:
        input_ids [n], labels [n]; a label is the token's own id where trained, else -100.

    Example: text `a b c`, one token per letter with its space, span of ` b`: labels `[-100, id, -100]`.
    """
    ids, labels = list(prefix), [IGNORED] * len(prefix)
    borders = spans if text.isascii() else _characters(text, spans)
    trained = list(zip(borders[::2], borders[1::2], strict=True))
    current = 0
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        while current < len(trained) and trained[current][1] <= start:
            current += 1
        inside = current < len(trained) and trained[current][0] <= start and start < end
        ids.append(token)
        labels.append(token if inside else IGNORED)
    return ids, labels


def _characters(text: str, borders: list[int]) -> list[int]:
    """Byte offsets as character offsets: what `tokenizers` reports."""
    data = text.encode("utf-8")
    return [len(data[:border].decode("utf-8")) for border in borders]


def added_bos(tokenizer: Tokenizer, folder: Path) -> tuple[str, int] | None:
    """Text and id of the BOS that the tokenizer puts in front by itself; None when it puts none."""
    added = tokenizer.encode("x", add_special_tokens=True).ids
    plain = tokenizer.encode("x", add_special_tokens=False).ids
    config = read_object(folder / "tokenizer_config.json")
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    bos_id = tokenizer.token_to_id(bos) if bos else None
    if bos is None or bos_id is None or added[:1] != [bos_id] or plain[:1] == [bos_id]:
        return None
    return bos, bos_id


class Encoded(NamedTuple):
    """One row that fits."""

    input_ids: list[int]
    """[n] token ids."""
    labels: list[int]
    """[n] the token's id where it is trained, else -100."""
    full_length: int
    """Tokens before cutting."""


@dataclass(frozen=True)
class RowEncoder:
    """Text and spans to ids and labels that fit; the step and `preview` share it."""

    tokenizer: Tokenizer
    bos: tuple[str, int] | None
    cutoff_len: int
    overlong: str

    @classmethod
    def from_step(cls, step: Step, base: Path) -> RowEncoder:
        """The encoder of a tokenize step.

        Raises:
            InputError: tokenizer.json is not one.
        """
        try:
            tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            problem = Problem(str(base / "tokenizer.json"), f"not a tokenizer: {error}", "Copy the model again.")
            raise InputError(problem) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        identity = step.identity
        return cls(tokenizer, added_bos(tokenizer, base), identity["cutoff_len"], identity["overlong"])

    def encode_batch(self, rows: list[dict[str, Any]]) -> list[Encoded | BadRow]:
        """Ids and labels of rows with `text` and `spans`; a `BadRow` where a row does not fit."""
        encodings = self.tokenizer.encode_batch([row["text"] for row in rows], add_special_tokens=False)
        found = []
        for row, encoding in zip(rows, encodings, strict=True):
            # exactly one BOS: the template's own, or the one the tokenizer would add
            prefix = [self.bos[1]] if self.bos and not row["text"].startswith(self.bos[0]) else []
            found.append(self._fit(*encode_row(encoding, row["text"], row["spans"], prefix)))
        return found

    def encode(self, text: str, spans: list[int]) -> Encoded | BadRow:
        """`encode_batch` of one row."""
        return self.encode_batch([{"text": text, "spans": spans}])[0]

    def _fit(self, ids: list[int], labels: list[int]) -> Encoded | BadRow:
        if len(ids) > self.cutoff_len and self.overlong != "truncate":
            return BadRow(TOO_LONG, f"{len(ids)} tokens, cutoff_len is {self.cutoff_len}")
        full_length, ids, labels = len(ids), ids[: self.cutoff_len], labels[: self.cutoff_len]
        if all(label == IGNORED for label in labels[1:]):  # the first token is never predicted
            return BadRow("no_trained_tokens", f"no token of an answer is left within cutoff_len {self.cutoff_len}")
        return Encoded(ids, labels, full_length)


def tokenize(work: Work) -> dict[str, Any]:
    """Tokenize every row, pack, write shards and `statistics.json`; chunks of an interrupted attempt are kept.

    Raises:
        InputError: a row too long under `overlong: error`, or no row left.
    """
    encoder = RowEncoder.from_step(work.step, work.inputs["base"])
    chunks = read_chunks(work.inputs["rendered"] / "rows")
    total = sum(pq.read_metadata(path).num_rows for path in chunks)
    done = 0
    for chunk in chunks:
        table = pq.read_table(chunk)
        finished = work.scratch / f"{chunk.stem}.json"
        if not finished.exists():
            refused = _tokenize_chunk(work, encoder, table, int(chunk.stem), done, total)
            part = finished.with_suffix(".part")
            part.write_text(json.dumps(refused, ensure_ascii=False), encoding="utf-8")
            part.rename(finished)
        done += table.num_rows
        work.progress(done, total, "rows")
    kept, rejects = _kept(work, total)
    rejects.write(work.output)
    statistics = _write_shards(work, kept) | {"left_out": rejects.counts(), "rows_read": total}
    (work.output / "statistics.json").write_text(json.dumps(statistics, indent=1), encoding="utf-8")
    return statistics


def _tokenize_chunk(
    work: Work, encoder: RowEncoder, table: pa.Table, number: int, done: int, total: int
) -> list[dict[str, Any]]:
    """Write one chunk of ids and labels; the rows that do not fit."""
    rows, refused = [], []
    for start in range(0, table.num_rows, BATCH):
        work.progress(done + start, total, "rows")
        batch = table.slice(start, BATCH).to_pylist()
        for row, encoded in zip(batch, encoder.encode_batch(batch), strict=True):
            origin = {"source": row["source"], "row": row["row"]}
            if isinstance(encoded, BadRow):
                refused.append(origin | {"place": row["place"], "reason": encoded.reason, "detail": encoded.detail})
            else:
                rows.append(origin | encoded._asdict())
    write_chunk(work.scratch, number, pa.Table.from_pylist(rows, ROW_SCHEMA))
    return refused


def _kept(work: Work, total: int) -> tuple[pa.Table, Rejects]:
    """All rows that fit, and the rows left out.

    Raises:
        InputError: a row too long under `overlong: error`, or none left.
    """
    rejects, files = Rejects(), work.step.runtime["files"]
    chunks = read_chunks(work.scratch)
    for chunk in chunks:
        for row in json.loads(chunk.with_suffix(".json").read_text(encoding="utf-8")):
            rejects.add(files[row["source"]], row["place"], row["row"], BadRow(row["reason"], row["detail"]))
    kept = pa.concat_tables([pq.read_table(chunk) for chunk in chunks])
    require_fitting(work.step, rejects, kept.num_rows)
    if rejects.rows:
        work.note(f"left out {len(rejects.rows)} of {total} rows: {rejects.counts()}")
    return kept, rejects


def require_fitting(step: Step, rejects: Rejects, rows: int) -> None:
    """End a run that `cutoff_len` leaves without rows, or that wants none left out.

    Raises:
        InputError: a row too long under `overlong: error`, or no row but those.
    """
    cure = "Raise cutoff_len, or set overlong: truncate to cut rows at the end."
    if step.identity["overlong"] == "error":
        rejects.raise_if_any("tokenize", cure)
    if rows == 0:
        shown = [Problem(f"{r['file']}, {r['place']}", r["detail"]) for r in rejects.rows[:SHOWN]]
        count = len(rejects.rows)
        raise InputError([*shown, Problem("cutoff_len", f"none of {count} rows can be used", cure)], "tokenize")


def _sequences(rows: pa.Table, groups: list[list[int]]) -> Iterator[dict[str, Any]]:
    for group in groups:
        members = rows.take(group).to_pylist()
        yield {
            "input_ids": [token for row in members for token in row["input_ids"]],
            "labels": [label for row in members for label in row["labels"]],
            "seq_lengths": [len(row["input_ids"]) for row in members],
            "sources": [row["source"] for row in members],
            "rows": [row["row"] for row in members],
        }


def _write_shards(work: Work, rows: pa.Table) -> dict[str, Any]:
    """Shards, `state.json` and `dataset_info.json`, as `datasets.Dataset.save_to_disk` lays them out."""
    cutoff_len, packing = work.identity["cutoff_len"], work.identity["packing"]
    lengths = pa.compute.list_value_length(rows["input_ids"]).to_pylist()
    groups = pack(lengths, cutoff_len) if packing else [[index] for index in range(len(lengths))]
    count = -(-len(groups) // SHARD_SEQUENCES)
    names = [f"data-{number:05d}-of-{count:05d}.arrow" for number in range(count)]
    for number, name in enumerate(names):
        part = groups[number * SHARD_SEQUENCES : (number + 1) * SHARD_SEQUENCES]
        work.progress(number, count, "shards")
        with pa.OSFile(str(work.output / name), "wb") as sink, pa.ipc.new_stream(sink, SHARD_SCHEMA) as writer:
            for start in range(0, len(part), 1000):
                writer.write_table(
                    pa.Table.from_pylist(list(_sequences(rows, part[start : start + 1000])), SHARD_SCHEMA)
                )
    _describe(work.output, names)
    trained = sum(label != IGNORED for labels in rows["labels"].to_pylist() for label in labels)
    ordered = sorted(lengths)
    return {
        "rows": len(lengths),
        "sequences": len(groups),
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "truncated": sum(full > kept for full, kept in zip(rows["full_length"].to_pylist(), lengths, strict=True)),
        "longest": ordered[-1],
        "median": ordered[len(ordered) // 2],
        "filled": round(sum(lengths) / (len(groups) * cutoff_len), 4) if packing else None,
    }


def _describe(output: Path, names: list[str]) -> None:
    """The two files by which `datasets` knows a saved data set."""
    kinds = {field.name: str(field.type.value_type) for field in SHARD_SCHEMA}
    features = {name: {"feature": {"dtype": kind, "_type": "Value"}, "_type": "List"} for name, kind in kinds.items()}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint([sha256_file(output / name) for name in names])[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (output / "dataset_info.json").write_text(json.dumps({"features": features}, indent=1), encoding="utf-8")
    (output / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
