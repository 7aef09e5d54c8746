"""Reading takes memory that does not grow with the file, and cutting lines takes no time for each of them."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.reading import raw_chunks

PROJECT = Path(__file__).parents[2]

# VmHWM is this program's own peak; getrusage's would begin with that of the process it was started from
PEAK = """
import re, sys
from pathlib import Path
import pyarrow.parquet
from tasks.reading import raw_chunks, chunk_rows
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
rows = sum(len(chunk_rows(chunk)) for chunk in raw_chunks(Path(sys.argv[1])))
print(rows, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet", "rows.arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """200 MB of rows take less than 150 MB more than nothing at all."""
    row = {"instruction": "x" * 500, "output": "é" * 240 + "\n" * 4}
    count, path = 200_000, tmp_path / name
    text = json.dumps(row, ensure_ascii=False).encode()
    if name.endswith((".parquet", ".arrow")):
        schema = pa.schema([("instruction", pa.string()), ("output", pa.string())])
        batch = pa.RecordBatch.from_pylist([row] * 1000, schema)
        make = pq.ParquetWriter if name.endswith(".parquet") else pa.ipc.new_stream
        with make(path, schema) as writer:
            for _ in range(count // 1000):
                writer.write_batch(batch)
    else:
        opener = gzip.open if name.endswith(".gz") else open
        head, end, line = (b"[\n", b"null]", text + b",\n") if name.endswith(".json") else (b"", b"", text + b"\n")
        if name.endswith(".csv"):
            head, line = b"instruction,output\n", b'"%b","%b"\n' % (b"x" * 500, "é".encode() * 240 + b"\n" * 4)
        with opener(path, "wb") as file:
            file.write(head)
            for _ in range(count // 1000):
                file.write(line * 1000)
            file.write(end)
    answer = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    rows, megabytes = map(int, answer.stdout.split())
    assert rows == count + name.endswith(".json")
    assert megabytes < 150


def test_lines_are_cut_into_chunks_without_work_for_each(tmp_path: Path) -> None:
    """40 MB in well under the time that a look at each of a million rows takes."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "some words", "n": 1}\n' * 1_000_000)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert sum(chunk.data.count(b"\n") for chunk in raw_chunks(path)) == 1_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - started < 1.0
