"""Reading: every kind of file gives the same rows, bad rows are values, memory stays bounded, chunks stay put."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from registry.data_files import COMPRESSIONS, KINDS
from registry.data_registry import find_dataset
from registry.errors import InputError
from tasks.raw_rows import CHUNK_BYTES, ChunkBuilder
from tasks.reading import CHUNK_ROWS, BadRow, RawChunk, chunk_rows, raw_chunks, read_rows

PROJECT = Path(__file__).parents[2]
ORACLE = Path(os.environ.get("LLAMATUNER_ORACLE") or PROJECT.parent / "shared" / "oracle")
ROWS = [
    {"instruction": "say “hi”", "input": "", "output": "hi,\tthere"},
    {"instruction": "two\nlines", "input": "1.0", "output": "  NA  "},
    {"instruction": "表情 😀", "input": "null", "output": 'a "quoted" word'},
]


def values(path: Path) -> list[Any]:
    return [row.value.reason if isinstance(row.value, BadRow) else row.value for row in read_rows(path)]


def places(path: Path) -> list[tuple[int, str]]:
    return [(row.row, row.place) for row in read_rows(path)]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table_bytes(rows: list[dict[str, Any]], write: Callable[[pa.Table, pa.BufferOutputStream], None]) -> bytes:
    sink = pa.BufferOutputStream()
    write(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def arrow_stream(table: pa.Table, sink: Any) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def arrow_file(table: pa.Table, sink: Any) -> None:
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def separated(rows: list[dict[str, Any]], separator: str, folder: Path) -> bytes:
    path = folder / "separated"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path.read_bytes()


def file_bytes(form: str, folder: Path) -> bytes:
    """The same rows in a form: a kind, with what is special about it behind a colon."""
    made: dict[str, Callable[[], bytes]] = {
        ".json": lambda: json.dumps(ROWS, indent=2).encode(),
        ".json:lines": lambda: json_lines(ROWS),
        ".json:bom": lambda: b"\xef\xbb\xbf\r\n" + json.dumps(ROWS, ensure_ascii=False).encode(),
        ".jsonl": lambda: json_lines(ROWS),
        ".jsonl:bom": lambda: b"\xef\xbb\xbf" + json_lines(ROWS).replace(b"\n", b"\r\n"),
        ".jsonl:array": lambda: json.dumps(ROWS).encode(),
        ".csv": lambda: separated(ROWS, ",", folder),
        ".csv:bom": lambda: b"\xef\xbb\xbf" + separated(ROWS, ",", folder),
        ".tsv": lambda: separated(ROWS, "\t", folder),
        ".parquet": lambda: table_bytes(ROWS, pq.write_table),
        ".arrow": lambda: table_bytes(ROWS, arrow_file),
        ".arrow:stream": lambda: table_bytes(ROWS, arrow_stream),
    }
    return made[form]()


def compressed(data: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(data)
    if compression == ".xz":
        return lzma.compress(data)
    if compression == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    return data


FORMS = (
    *(".json", ".json:lines", ".json:bom", ".jsonl", ".jsonl:bom", ".jsonl:array", ".csv", ".csv:bom", ".tsv"),
    *(".parquet", ".arrow", ".arrow:stream"),
)


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_file_gives_equal_rows_compressed_or_not(tmp_path: Path, form: str, compression: str) -> None:
    path = tmp_path / f"rows{form.split(':')[0]}{compression}"
    path.write_bytes(compressed(file_bytes(form, tmp_path), compression))
    assert values(path) == ROWS
    assert [row.row for row in read_rows(path)] == [0, 1, 2]


def test_every_kind_is_among_those_forms() -> None:
    assert {form.split(":")[0] for form in FORMS} | {".txt"} == set(KINDS)


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
def test_each_line_of_a_text_file_is_a_row_and_blank_ones_are_none(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"rows.txt{compression}"
    path.write_bytes(compressed(b"\xef\xbb\xbf = Title = \r\n\n   \n\xe4\xb8\xad\n[1, 2]\n\xff\nlast", compression))
    assert values(path) == [{"text": " = Title = "}, {"text": "中"}, {"text": "[1, 2]"}, "not_utf8", {"text": "last"}]
    assert places(path) == [(0, "line 1"), (1, "line 4"), (2, "line 5"), (3, "line 6"), (4, "line 7")]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_damaged_compressed_file_is_one_error_with_file_and_cure(tmp_path: Path, compression: str) -> None:
    whole = compressed(json_lines([{"text": os.urandom(100).hex()} for _ in range(5000)]), compression)
    path = tmp_path / f"rows.jsonl{compression}"
    for data in (whole[: len(whole) // 2], whole[:-3], b"not compressed"):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"rows\.jsonl\.\w+: not a whole \w+ file: .*download it again"):
            values(path)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.parquet.gz", "rows.arrow.zst"])
def test_a_damaged_table_is_one_error_with_file_and_cure(tmp_path: Path, name: str) -> None:
    whole = file_bytes(f".{name.split('.')[1]}", tmp_path)
    suffix = Path(name).suffix if name.count(".") == 2 else ""
    for data in (whole[: len(whole) // 2], b"something else"):
        (tmp_path / name).write_bytes(compressed(data, suffix))
        with pytest.raises(InputError, match=r"not a whole (Parquet|Arrow) file: .*download it again"):
            values(tmp_path / name)


def test_a_torn_last_line_is_a_bad_row_by_its_number_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(ROWS[:2]) + b'{"instruction": "brok')
    assert values(path) == [*ROWS[:2], "malformed_json"]
    assert places(path)[-1] == (2, "line 3")


def test_a_table_row_that_fits_no_header_is_a_bad_row_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,2\n\n3\n4,5,6\n"x"y,7\n\xff,8\n9,"' + b"t" * 200_000 + b'"\n10,"torn')
    assert values(path) == [
        {"a": "1", "b": "2"},
        "wrong_cells",
        "wrong_cells",
        "malformed_csv",
        "not_utf8",
        {"a": "9", "b": "t" * 200_000},
        "malformed_csv",
    ]
    assert places(path)[1] == (1, "row 1")
    details = [row.value.detail for row in read_rows(path) if isinstance(row.value, BadRow)]
    assert details[0] == "1 cells under 2 names"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("rows.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("rows.csv", b"\xff,b\n1,2\n", "rows.csv:1: the names of the columns cannot be read"),
        ("rows.json", b'{\n "rows": [\n  {"a": 1}]}', "one JSON object over several lines"),
        ("rows.json", b'[{"a": 1}, {"a": 2}', r"rows\.json:1: not valid JSON: Expecting ',' delimiter"),
        ("rows.json", b'[{"a": 1},\n {"a"\n: }]', r"rows\.json:3: not valid JSON: Expecting value, in row 1"),
        ("rows.json", b'[{"a": 1},\n]', r"rows\.json:2: not valid JSON: Expecting value, in row 1"),
        ("rows.json", b'[{"a": 1}]\n{"a": 2}', r"rows\.json:2: not valid JSON: Extra data"),
        ("rows.json", b'[{"a": "x\ny"}]', r"rows\.json:1: not valid JSON: Invalid control character"),
        ("rows.json", b"[" * 100_000, "not readable JSON: maximum recursion depth"),
        ("rows.jsonl", "{}\n".encode("utf-16"), "UTF-16 text. Save the file as UTF-8"),
        ("rows.xlsx", b"PK", r"not one of \.json, \.jsonl"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_error(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said):
        values(tmp_path / name)


LINES = [
    (b'{"a": 18446744073709551615}', {"a": 2**64 - 1}),
    (b'{"a": [123456789012345678901234567890]}', {"a": [123456789012345678901234567890]}),
    (b'{"a": -9223372036854775809}', {"a": -(2**63) - 1}),
    (b'{"a": 1.5e3, "a": 2}', {"a": 2}),
    (b'{"a": NaN}', "malformed_json"),
    (b'{"a": -Infinity}', "malformed_json"),
    (b'{"a": 1e999}', "malformed_json"),
    (b'{"a": ' + b"9" * 5000 + b"}", "malformed_json"),
    (b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
    (b'{"a": "\\ud83d"}', "not_utf8"),
    (b'{"a": "\xff"}', "not_utf8"),
    (b'{"a": "\t"}', "malformed_json"),
    (b'{"a": 1} {"a": 2}', "malformed_json"),
    (b'["\\u0000bad row", "x"]', "not_an_object"),
    (b"12", "not_an_object"),
]


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line.decode("latin-1")[:24] for line, _ in LINES])
def test_numbers_are_exact_or_the_row_is_bad(tmp_path: Path, line: bytes, expected: Any) -> None:
    assert values(write(tmp_path / "rows.jsonl", b"{}\n" + line)) == [{}, expected]
    if not isinstance(expected, str) or line.startswith(b'{"a": NaN'):
        assert values(write(tmp_path / "rows.json", b"[" + line + b"]")) == [expected]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_an_array_gives_bad_rows_the_same_way(tmp_path: Path) -> None:
    text = b'[{"a": NaN}, [1],\n {"a":\r\n 123456789012345678901}, "x", {"a": "\\ud83d"}]'
    path = write(tmp_path / "rows.json", text)
    assert values(path) == [
        "malformed_json",
        "not_an_object",
        {"a": 123456789012345678901},
        "not_an_object",
        "not_utf8",
    ]
    assert places(path)[2] == (2, "row 2")
    assert [chunk.data.count(b"\n") for chunk in raw_chunks(path)] == [5]


def test_values_of_tables_keep_their_types_as_far_as_json_has_them(tmp_path: Path) -> None:
    row = {
        "count": 3,
        "share": 0.5,
        "label": True,
        "day": date(2024, 1, 2),
        "price": Decimal("1.50"),
        "bytes": b"text",
        "none": None,
        "turns": [{"from": "human", "value": "a"}],
        "nan": float("nan"),
    }
    expected = {**row, "day": "2024-01-02", "price": "1.50", "bytes": "text", "nan": None}
    for name, data in (("rows.parquet", pq.write_table), ("rows.arrow", arrow_file)):
        (tmp_path / name).write_bytes(table_bytes([row], data))
        assert values(tmp_path / name) == [expected]
    (tmp_path / "rows.arrow").write_bytes(table_bytes([{"a": b"\xff"}, {"a": b"ok"}], arrow_stream))
    assert values(tmp_path / "rows.arrow") == ["not_utf8", {"a": "ok"}]


def test_a_field_that_is_null_for_a_long_time_may_still_become_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"q": "x" * 200, "system": None}] * 60_000 + [{"q": "y", "system": "be brief"}]))
    rows = list(read_rows(path))
    assert len(rows) == 60_001
    assert rows[-1].value == {"q": "y", "system": "be brief"}
    assert (rows[-1].row, rows[-1].place) == (60_000, "line 60001")


def long_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": f"{n} " + "x" * (n * 37 % 900), "n": str(n)} for n in range(count)]


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow"])
def test_appended_rows_leave_the_chunks_before_them_as_they_were(tmp_path: Path, kind: str) -> None:
    def chunks(rows: list[dict[str, Any]]) -> list[RawChunk]:
        data: dict[str, Callable[[], bytes]] = {
            ".json": lambda: json.dumps(rows, indent=1).encode(),
            ".jsonl": lambda: json_lines(rows)[:-1],  # the last line has no end: it must not matter
            ".csv": lambda: separated(rows, ",", tmp_path),
            ".txt": lambda: "\n\n".join(row["text"] for row in rows).encode(),
            ".parquet": lambda: table_bytes(rows, pq.write_table),
            ".arrow": lambda: table_bytes(rows, arrow_stream),
        }
        return list(raw_chunks(write(tmp_path / f"rows{kind}", data[kind]())))

    rows = long_rows(3 * CHUNK_ROWS + 50)
    shorter, longer = chunks(rows[: 2 * CHUNK_ROWS]), chunks(rows)
    assert len(shorter) >= 2
    assert longer[: len(shorter) - 1] == shorter[:-1]
    if len(chunk_rows(shorter[-1])) == CHUNK_ROWS:
        assert longer[len(shorter) - 1] == shorter[-1]
    found = [row for chunk in longer for row in chunk_rows(chunk)]
    assert [row.row for row in found] == list(range(len(rows)))
    assert max(len(chunk_rows(chunk)) for chunk in longer) <= CHUNK_ROWS


def test_a_chunk_ends_behind_the_row_that_fills_it(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 3_000_000}).encode()
    path = write(tmp_path / "rows.jsonl", b"\n".join([line] * 7))
    assert [len(chunk_rows(chunk)) for chunk in raw_chunks(path)] == [3, 3, 1]
    assert [(chunk.first_row, chunk.first_line) for chunk in raw_chunks(path)] == [(0, 1), (3, 4), (6, 7)]
    array = write(tmp_path / "rows.json", b"[" + b",\n".join([line] * 7) + b"]")
    assert [(chunk.first_row, chunk.data) for chunk in raw_chunks(array)] == [
        (chunk.first_row, chunk.data) for chunk in raw_chunks(path)
    ]
    assert 3 * len(line) > CHUNK_BYTES > 2 * len(line)
    builder = ChunkBuilder()
    assert [builder.add(b"{}") is None for _ in range(CHUNK_ROWS)] == [True] * (CHUNK_ROWS - 1) + [False]


@pytest.mark.parametrize("shift", range(0, 40, 3))
def test_elements_are_whole_wherever_a_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    monkeypatch.setattr("tasks.reading_arrays.BLOCK_BYTES", 17)
    monkeypatch.setattr("tasks.reading_lines.BLOCK_BYTES", 17)
    rows = [{"é" * n: '😀\\"\n' * n, "n": [-n, 12345678, 1.5e-7, True, None, {"a": []}]} for n in range(9)]
    spaces = b" " * shift
    path = write(
        tmp_path / "rows.json", spaces + json.dumps(rows, ensure_ascii=shift % 2 == 0, indent=shift % 3).encode()
    )
    assert values(path) == rows
    assert values(write(tmp_path / "rows.jsonl", spaces + b"\n" + json_lines(rows))) == rows
    assert values(write(path, b"[1, 23, 456, true, 78901234567]")) == ["not_an_object"] * 5


DEMO = {
    "alpaca": ({"file_name": "alpaca_en_demo.json"}, 999, {"instruction", "input", "output"}),
    "dpo": ({"file_name": "dpo_en_demo.json", "ranking": True, "formatting": "sharegpt"}, 300, {"chosen"}),
    "tools": ({"file_name": "glaive_toolcall_zh_demo.json", "formatting": "sharegpt"}, 300, {"tools"}),
    "c4": ({"file_name": "c4_demo.jsonl", "columns": {"prompt": "text"}}, 300, {"text"}),
    "wiki": ({"file_name": "wiki_demo.txt", "columns": {"prompt": "text"}}, 30, {"text"}),
    "reason": ({"file_name": "reason_tool_use_demo_50.jsonl", "formatting": "openai"}, 50, {"messages"}),
    "all_kto": ({"file_name": "kto_*_demo.json", "formatting": "sharegpt"}, 300, {"messages", "label"}),
}


@pytest.mark.skipif(
    not (ORACLE / "datasets").is_dir(), reason="the oracle's data sets are not here (LLAMATUNER_ORACLE)"
)
@pytest.mark.parametrize("name", DEMO)
def test_published_demo_files_are_read_through_a_dataset_info(tmp_path: Path, name: str) -> None:
    demos = ORACLE / "datasets" / "llamafactory"
    entries = {key: {**entry, "file_name": str(demos / entry["file_name"])} for key, (entry, _, _) in DEMO.items()}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    source = find_dataset(name, tmp_path, "dataset")
    rows = [row for file in source.files for row in read_rows(file)]
    _, count, columns = DEMO[name]
    assert len(rows) == count
    assert [row for row in rows if isinstance(row.value, BadRow)] == []
    assert all(columns <= set(row.value) for row in rows if isinstance(row.value, dict))
    if source.files[0].suffix == ".json":
        expected = [row for file in source.files for row in json.loads(file.read_text(encoding="utf-8"))]
        assert [row.value for row in rows] == expected
