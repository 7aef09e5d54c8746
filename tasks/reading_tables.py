"""Tables (CSV, TSV, Parquet, Arrow) to chunks: a row becomes one JSON object.

One decision: no type is inferred. A CSV cell is the text between its separators, also when that is "" or "1.0";
Parquet and Arrow values keep the types they were written with, as far as JSON has them: times become ISO 8601 text,
decimals their digits, NaN and infinity null, bytes the UTF-8 text they hold.
"""

from __future__ import annotations

import csv
import decimal
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from registry.errors import InputError, Problem
from tasks.raw_rows import MAX_ROW_BYTES, ChunkBuilder, RawChunk, bad_line
from tasks.reading_files import open_data, require_kind

BATCH_ROWS = 500
ARROW_FILE = b"ARROW1"
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def table_chunks(path: Path) -> Iterator[RawChunk]:
    """The rows of a table as JSON lines.

    Raises:
        InputError: the file is damaged, or has no usable header.
    """
    kind = require_kind(path)[0]
    make: dict[str, Callable[[Path], Iterator[bytes]]] = {".parquet": _parquet_lines, ".arrow": _arrow_lines}
    chunks = ChunkBuilder()
    for line in make.get(kind, _csv_lines)(path):
        chunk = chunks.add(line)
        if chunk:
            yield chunk
    chunk = chunks.close()
    if chunk:
        yield chunk


def _csv_lines(path: Path) -> Iterator[bytes]:
    """Rows under the names of the first one; a row of another length or with broken quotes is a bad one."""
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's own is 131,072 characters: a long text is longer
    with open_data(path) as file, _decoded(file) as text:
        reader = csv.reader(text, delimiter=SEPARATORS[require_kind(path)[0]], strict=True)
        header = _header(reader, path)
        while header:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield bad_line("malformed_csv", f"not valid CSV ({error})")
                continue
            if len(cells) == len(header):
                yield _json_line(dict(zip(header, cells, strict=True)))
            elif cells:
                yield bad_line("wrong_cells", f"{len(cells)} cells under {len(header)} names")


def _decoded(file: BinaryIO) -> io.TextIOWrapper:
    """Text of which bytes that are not UTF-8 stay recognisable, so that they spoil their own row only."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _header(reader: Any, path: Path) -> list[str]:
    try:
        header: list[str] = next((cells for cells in reader if cells), [])
        "".join(header).encode()
    except (csv.Error, UnicodeEncodeError) as error:
        raise InputError(Problem(f"{path}:1", f"the names of the columns cannot be read: {error}")) from error
    _once(header, path)
    return header


def _once(names: list[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        rule = f"two columns are named {', '.join(map(repr, twice))}"
        raise InputError(Problem(str(path), rule, "Rename one; the first line of a CSV file holds the names."))


def _parquet_lines(path: Path) -> Iterator[bytes]:
    import pyarrow.parquet as pq

    with _seekable(path) as file:
        try:
            # read page by page: a row group as a whole can be larger than the memory
            table = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            _once(table.schema_arrow.names, path)
            for batch in table.iter_batches(BATCH_ROWS):
                yield from _batch_lines(batch)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, "Parquet", error) from error


def _seekable(path: Path) -> BinaryIO:
    """A file that can be read from its end, as Parquet is; a compressed one is unpacked to a temporary file."""
    if not require_kind(path)[1]:
        return open(path, "rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - closed, and so removed, by the caller
    with open_data(path) as file:
        shutil.copyfileobj(file, unpacked, 1 << 20)
    unpacked.seek(0)
    return unpacked


def _arrow_lines(path: Path) -> Iterator[bytes]:
    """Record batches of an IPC stream, or of an IPC file, which is a stream between two signatures."""
    try:
        with open_data(path) as file:
            head = file.read(8)
        with open_data(path) as file:
            if head.startswith(ARROW_FILE) and not require_kind(path)[1]:
                table = pa.ipc.open_file(file)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                file.read(8 if head.startswith(ARROW_FILE) else 0)
                batches = iter(pa.ipc.open_stream(file))
            for batch in batches:
                _once(batch.schema.names, path)
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield from _batch_lines(batch.slice(start, BATCH_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, "Arrow", error) from error


def _batch_lines(batch: pa.RecordBatch) -> Iterator[bytes]:
    names = batch.schema.names
    for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        yield _json_line(dict(zip(names, values, strict=True)))


def _json_line(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=_json_value)
    except TypeError as error:  # orjson.JSONEncodeError
        why = error.__cause__ or error
        if isinstance(why, UnicodeError) or "UTF-8" in str(why):
            return bad_line("not_utf8", "a value holds bytes that are not UTF-8 text")
        return bad_line("wrong_type", f"a value has no form in JSON ({why})")


def _json_value(value: Any) -> str:
    """Text for a value that JSON has no type for.

    Raises:
        UnicodeDecodeError: bytes that are no text.
        TypeError: any other value.
    """
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, decimal.Decimal | timedelta):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no text, number, time, list or mapping")


def _damaged(path: Path, kind: str, error: Exception) -> InputError:
    rule = f"not a whole {kind} file: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return InputError(Problem(str(path), rule, "Copy or download it again."))
