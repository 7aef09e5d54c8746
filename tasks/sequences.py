"""What a tokenize artifact holds: tokenized rows in shards, and the sequences that training sees.

One decision: a row's tokens are written once. A sequence is a list of pieces of rows in `sequences.arrow`, so packing
anew, repeating or mixing data sets, or adding rows, copies no token. The shards are what `datasets.load_from_disk`
opens: one row each, with `input_ids` and `labels`, `list<int32>`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow as pa
from numpy.typing import NDArray

from tasks.canonical import MARKS, mark_field
from tasks.fingerprint import fingerprint
from tasks.packing import Sequences

IGNORED = -100  # the label of a token that is not trained
INDEX = "sequences.arrow"
FEWEST = 8  # tokens in common that are worth a pass of their own
ORIGINS = "origins.json"  # of each shard: numbers of the data set and of its file
SHARD_FIELDS = [
    *(("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))),
    *(("row", pa.int64()), ("line", pa.int32())),
]
DATASETS_TYPES = {
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.float64(): "float64",
    pa.bool_(): "bool",
    pa.string(): "string",
}
INDEX_SCHEMA = pa.schema(
    [("rows", pa.list_(pa.int64())), ("starts", pa.list_(pa.int32())), ("lengths", pa.list_(pa.int32()))]
)


def shard_schema(shape: str) -> pa.Schema:
    """The columns of a shard of rows of a shape."""
    return pa.schema([*SHARD_FIELDS, *mark_field(shape)])


def common(rows: SequenceOf[tuple[int, ...]]) -> int:
    """Tokens that all rows begin with; 0 where it is not worth a pass of its own."""
    least, most = min(rows), max(rows)  # in the order of their tokens: what these two share, all do
    pairs = enumerate(zip(least, most, strict=False))
    found = next((at for at, (one, other) in pairs if one != other), min(len(least), len(most)))
    return found if found >= FEWEST else 0


class Sequence(NamedTuple):
    """One sequence."""

    input_ids: NDArray[numpy.int32]
    """[s] token ids."""
    labels: NDArray[numpy.int32]
    """[s] the token's id where it is trained, else -100."""
    seq_lengths: NDArray[numpy.int32]
    """[pieces] tokens of each piece; pieces never see each other."""


class _Shard:
    """One memory-mapped shard."""

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        # written as one batch; combining chunks would copy them, even a single one
        ids, labels = (table[name].chunk(0) for name in ("input_ids", "labels"))
        self.offsets: NDArray[numpy.int32] = ids.offsets.to_numpy()
        self.input_ids: NDArray[numpy.int32] = ids.values.to_numpy()
        self.labels: NDArray[numpy.int32] = labels.values.to_numpy()
        self.numbers: NDArray[numpy.int64] = table["row"].chunk(0).to_numpy()
        named = next((name for name in MARKS.values() if name in table.column_names), None)
        self.marks = table[named].chunk(0) if named else None


class TokenizedRows:
    """The rows of a tokenize artifact, read where they lie.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.shards = [_Shard(folder / file["filename"]) for file in state["_data_files"]]
        counts = [len(shard.offsets) - 1 for shard in self.shards]
        self.first = numpy.concatenate([[0], numpy.cumsum(counts, dtype=numpy.int64)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def lengths(self) -> NDArray[numpy.int64]:
        """[rows] tokens of each row."""
        sizes = [numpy.diff(shard.offsets) for shard in self.shards]
        return numpy.concatenate([numpy.zeros(0, numpy.int64), *sizes])

    def numbers(self) -> NDArray[numpy.int64]:
        """[rows] the number, counted from 0, that each has in its file."""
        return numpy.concatenate([numpy.zeros(0, numpy.int64), *(shard.numbers for shard in self.shards)])

    def files(self) -> NDArray[numpy.int64]:
        """[rows] the number, counted from 0, that its file has in its data set."""
        return self._origins("file")

    def sources(self) -> NDArray[numpy.int64]:
        """[rows] the number, counted from 0, of the data set that each is of."""
        return self._origins("source")

    def _origins(self, name: str) -> NDArray[numpy.int64]:
        origins = json.loads((self.folder / ORIGINS).read_text(encoding="utf-8"))
        return numpy.repeat(numpy.array([origin[name] for origin in origins], numpy.int64), numpy.diff(self.first))

    def mark(self, row: int) -> Any:
        """What else is known of a row: the margin of its pair, whether its answer is good, the answer to its prompt."""
        number = int(numpy.searchsorted(self.first, row, side="right")) - 1
        marks = self.shards[number].marks
        return marks[int(row - self.first[number])].as_py() if marks is not None else None

    def piece(self, row: int, start: int, length: int) -> tuple[NDArray[numpy.int32], NDArray[numpy.int32]]:
        """Ids and labels of part of a row."""
        number = int(numpy.searchsorted(self.first, row, side="right")) - 1
        shard = self.shards[number]
        begin = int(shard.offsets[row - self.first[number]]) + start
        return shard.input_ids[begin : begin + length], shard.labels[begin : begin + length]


class TokenizedSequences:
    """The sequences of a tokenize artifact.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.rows = TokenizedRows(folder)
        table = pa.ipc.open_stream(pa.memory_map(str(folder / INDEX))).read_all()
        columns = [table[name].chunk(0) for name in INDEX_SCHEMA.names]
        self.offsets: NDArray[numpy.int32] = columns[0].offsets.to_numpy()
        self.members, self.starts, self.sizes = (column.values.to_numpy() for column in columns)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sequence:
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        pieces = [
            self.rows.piece(int(row), int(start), int(length))
            for row, start, length in zip(self.members[span], self.starts[span], self.sizes[span], strict=True)
        ]
        ids, labels = zip(*pieces, strict=True)
        return Sequence(numpy.concatenate(ids), numpy.concatenate(labels), self.sizes[span])

    def rows_of(self, index: int) -> list[int]:
        """The rows, counted over all shards, of a sequence."""
        return [int(row) for row in self.members[int(self.offsets[index]) : int(self.offsets[index + 1])]]

    def begun(self, index: int) -> int:
        """Texts that begin in a sequence; those that only go on in it were counted where they began."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return int((self.starts[span] == 0).sum())

    def lengths(self) -> NDArray[numpy.int64]:
        """[sequences] tokens of each."""
        return numpy.add.reduceat(self.sizes, self.offsets[:-1]) if len(self) else numpy.zeros(0, numpy.int64)


def write_index(output: Path, sequences: Sequences) -> None:
    """Write `sequences.arrow`."""
    offsets = pa.array(sequences.offsets, pa.int32())
    flat = [
        pa.array(sequences.rows, pa.int64()),
        pa.array(sequences.starts, pa.int32()),
        pa.array(sequences.lengths, pa.int32()),
    ]
    batch = pa.RecordBatch.from_arrays(
        [pa.ListArray.from_arrays(offsets, values) for values in flat], schema=INDEX_SCHEMA
    )
    with pa.OSFile(str(output / INDEX), "wb") as sink, pa.ipc.new_stream(sink, INDEX_SCHEMA) as writer:
        writer.write_batch(batch)


def describe_shards(output: Path, names: SequenceOf[str], digests: SequenceOf[str], shape: str = "chat") -> None:
    """The two files by which `datasets` knows a saved data set.

    Args:
        output: the artifact's folder.
        names, digests: of the shards, in order.
        shape: of their rows.
    """
    features: dict[str, Any] = {}
    for field in shard_schema(shape):
        nested = pa.types.is_list(field.type)
        value = {"dtype": DATASETS_TYPES[field.type.value_type if nested else field.type], "_type": "Value"}
        features[field.name] = {"feature": value, "_type": "List"} if nested else value
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint(list(digests))[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (output / "dataset_info.json").write_text(json.dumps({"features": features}, indent=1), encoding="utf-8")
    (output / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
