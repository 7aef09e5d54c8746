"""A file cut with the help of its earlier cuts gives what it gives when it is cut for the first time."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from registry.errors import InputError
from tasks.cuts import Cut, Cuts
from tasks.digests import DigestMemory
from tasks.raw_rows import CHUNK_BYTES, CHUNK_ROWS
from tasks.reading import count_rows, file_digest, known_cuts, raw_chunks
from tasks.reading_lines import BLOCK_BYTES, cut_again

Lines = list[bytes]
COUNT = 3 * CHUNK_ROWS + 40


@pytest.fixture
def memory(tmp_path: Path) -> DigestMemory:
    return DigestMemory(tmp_path / "digests.sqlite")


def lines(count: int, mark: str = "q") -> Lines:
    return [b'{"%s": %d}\n' % (mark.encode(), n) for n in range(count)]


def chunks(path: Path, known: list[Cut] | None = None) -> list[tuple[int, int, bytes, int, str]]:
    return [
        (chunk.first_row, chunk.first_line, chunk.data, chunk.rows, chunk.digest()) for chunk in raw_chunks(path, known)
    ]


def require_the_same(path: Path, memory: DigestMemory) -> str:
    """Chunks and the file's digest, which is returned, with the memory are those without."""
    digest = file_digest(path, memory)
    assert digest == file_digest(path, DigestMemory(memory.path.with_name("new.sqlite")))
    memory.path.with_name("new.sqlite").unlink()
    known = known_cuts(path, digest, memory)
    assert known is not None
    assert chunks(path, known) == chunks(path)
    assert count_rows(path, known) == count_rows(path)
    return digest


class Counted(io.BufferedReader):
    """A file that knows how many of its bytes were searched for lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.searched = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.searched += len(found)
        return found


def searched(path: Path, memory: DigestMemory) -> int:
    """How many bytes are searched for lines, when a file's digest is wanted."""
    with Counted(path) as file:
        cut_again(file, path, Cuts(memory, path))
        return file.searched


def with_blank_lines(rows: Lines) -> None:
    rows[10:10] = [b"\n"] * (3 * CHUNK_ROWS)  # chunks without a row among them


def changed(index: int, line: bytes) -> Callable[[Lines], None]:
    def change(rows: Lines) -> None:
        assert line != rows[index]
        rows[index] = line

    return change


CHANGES: dict[str, Callable[[Lines], Any]] = {
    "nothing": lambda rows: None,
    "a row more": lambda rows: rows.append(b'{"n": 1}\n'),
    "many rows more": lambda rows: rows.extend(lines(2 * CHUNK_ROWS)),
    "a row that fills a chunk": lambda rows: rows.append(b'{"n": "%s"}\n' % (b"x" * CHUNK_BYTES)),
    "a row in front": lambda rows: rows.insert(0, b'{"n": 1}\n'),
    "a row in the middle": lambda rows: rows.insert(CHUNK_ROWS + 7, b'{"n": 1}\n'),
    "a chunk in the middle": lambda rows: rows.__setitem__(slice(CHUNK_ROWS, CHUNK_ROWS), lines(CHUNK_ROWS, "new")),
    "a row less": lambda rows: rows.pop(CHUNK_ROWS + 7),
    "a chunk less": lambda rows: rows.__delitem__(slice(CHUNK_ROWS, 2 * CHUNK_ROWS)),
    "a chunk twice": lambda rows: rows.extend(rows[:CHUNK_ROWS]),
    "only the start": lambda rows: rows.__delitem__(slice(CHUNK_ROWS + 5, None)),
    "only the first chunk": lambda rows: rows.__delitem__(slice(CHUNK_ROWS, None)),
    "nothing left": lambda rows: rows.clear(),
    "an equally long row": changed(CHUNK_ROWS + 7, b'{"r": 2007}\n'),
    "a longer row": changed(CHUNK_ROWS + 7, b'{"longer": 2007}\n'),
    "an equally long blank line": changed(CHUNK_ROWS + 7, b"           \n"),
    "an equally long line torn in two": changed(CHUNK_ROWS + 7, b'{"q":\n2007}\n'),
    "the end of a line lost": changed(2 * CHUNK_ROWS - 1, b'{"q": 3999} '),
    "line ends of another kind": lambda rows: rows.__setitem__(slice(None), [r[:-1] + b"\r\n" for r in rows]),
    "blank lines": with_blank_lines,
    "a byte order mark": lambda rows: rows.insert(0, b"\xef\xbb\xbf"),
}


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changed_in_a_file_it_is_cut_as_a_new_one_is(
    tmp_path: Path, memory: DigestMemory, change: str, ended: bool
) -> None:
    path, rows = tmp_path / "rows.jsonl", lines(COUNT)
    end = None if ended else -1
    path.write_bytes(b"".join(rows)[:end])
    require_the_same(path, memory)
    CHANGES[change](rows)
    path.write_bytes(b"".join(rows)[:end])
    require_the_same(path, memory)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n" * (2 * CHUNK_ROWS)])
@pytest.mark.parametrize("count", [CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_a_last_line_without_an_end_may_go_on(tmp_path: Path, memory: DigestMemory, start: bytes, count: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start + b"".join(lines(count))[:-3])
    require_the_same(path, memory)
    for more in (b"45", b'6}\n{"q": 7}', b"\n", b"".join(lines(CHUNK_ROWS))):
        with path.open("ab") as file:
            file.write(more)
        require_the_same(path, memory)


@pytest.mark.parametrize("seed", range(4))
def test_a_file_edited_again_and_again_is_cut_as_a_new_one_is(tmp_path: Path, memory: DigestMemory, seed: int) -> None:
    chance, path, rows = random.Random(seed), tmp_path / "rows.jsonl", lines(4 * CHUNK_ROWS)
    for step in range(12):
        place, count = chance.randrange(len(rows)), chance.choice([1, 1, 3, CHUNK_ROWS])
        kind = chance.choice(["insert", "delete", "replace", "append", "blank", "large"])
        if kind == "insert":
            rows[place:place] = lines(count, f"i{step}")
        elif kind == "delete" and len(rows) > 2 * CHUNK_ROWS:
            del rows[place : place + count]
        elif kind == "replace":
            rows[place] = rows[place][::-1].strip() + b"\n"
        elif kind == "blank":
            rows[place] = b" " * (len(rows[place]) - 1) + b"\n"
        elif kind == "large":
            rows[place] = b'{"n": "%s"}\n' % (b"x" * chance.choice([CHUNK_BYTES // 2, CHUNK_BYTES]))
        else:
            rows += lines(count, f"a{step}")
        path.write_bytes(b"".join(rows))
        require_the_same(path, memory)


def test_only_what_is_new_is_searched_for_lines(tmp_path: Path, memory: DigestMemory) -> None:
    path, rows = tmp_path / "rows.jsonl", [b'{"q": "%06d"}\n' % n for n in range(300 * CHUNK_ROWS + 10)]
    size = len(rows[0])
    path.write_bytes(b"".join(rows))
    assert searched(path, memory) == 3 + len(rows) * size
    assert searched(path, memory) == 3 + 10 * size
    rows += [b'{"r": "%06d"}\n' % n for n in range(CHUNK_ROWS)]
    path.write_bytes(b"".join(rows))
    assert searched(path, memory) == 3 + (10 + CHUNK_ROWS) * size
    rows[2] = b'{"s": "000002"}\n'  # one block is read behind it, and then there is a cut that was there before
    path.write_bytes(b"".join(rows))
    assert searched(path, memory) == 3 + BLOCK_BYTES + 10 * size
    rows.insert(2, b"{}\n")  # all lines behind it stand elsewhere
    path.write_bytes(b"".join(rows))
    assert searched(path, memory) == 3 + len(rows) * size - size + 3


def test_equal_bytes_have_equal_digests_and_others_have_others(tmp_path: Path, memory: DigestMemory) -> None:
    data = b"".join(lines(COUNT))
    given = [data, data[:-1], b"\xef\xbb\xbf" + data, data + b"\n", b"\n" + data, data[:-2] + b"\n}", b"", b"\n"]
    digests = {}
    for number, content in enumerate(given):
        for name in (f"{number}.jsonl", f"{number}.txt", "overwritten.jsonl"):
            (tmp_path / name).write_bytes(content)
            digests[number, name] = require_the_same(tmp_path / name, memory)
    assert len(set(digests.values())) == len(given)


def test_bytes_that_changed_since_they_were_looked_at_are_not_taken_for_them(
    tmp_path: Path, memory: DigestMemory
) -> None:
    path, rows = tmp_path / "rows.jsonl", lines(COUNT)
    path.write_bytes(b"".join(rows))
    os.utime(path, (1000, 1000))
    digest = file_digest(path, memory)
    known = known_cuts(path, digest, memory)
    rows[CHUNK_ROWS + 7] = b'{"r": 2007}\n'
    with path.open("r+b") as file:
        file.write(b"".join(rows))
    os.utime(path, (1000, 1000))  # the old size, time and inode: nobody does it by accident
    assert file_digest(path, memory) == digest
    first, second, *_ = raw_chunks(path, known)
    assert len(first.data) == len(b"".join(lines(CHUNK_ROWS)))
    with pytest.raises(InputError, match=r"rows.jsonl: other bytes than when it was looked at. Run again .* touch it"):
        _ = second.data
    os.utime(path, (2000, 2000))
    assert require_the_same(path, memory) != digest
    path.write_bytes(b"".join(rows[:10]))
    assert known_cuts(path, "0" * 64, memory) is None


def test_what_is_remembered_of_other_bytes_is_not_believed(tmp_path: Path, memory: DigestMemory) -> None:
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    path.write_bytes(b"".join(lines(COUNT)))
    other.write_bytes(b"".join(lines(COUNT, "other")))
    file_digest(other, memory)
    kept = memory.cuts(other)
    assert kept is not None
    memory.keep_cuts(path, kept)
    require_the_same(path, memory)
    assert memory.cuts(path) != kept
    memory.keep_cuts(path, kept.replace(str(CHUNK_BYTES), "1"))  # by another rule
    require_the_same(path, memory)
    for size in (0, 1, 10**12):
        pieces = [[0, size, 1, 1, True, "0" * 64]]
        memory.keep_cuts(path, json.dumps({"rule": [CHUNK_ROWS, CHUNK_BYTES], "pieces": pieces}))
        require_the_same(path, memory)


def test_lines_of_plain_text_are_cut_alike(tmp_path: Path, memory: DigestMemory) -> None:
    path = tmp_path / "rows.txt"
    for count in (COUNT, COUNT + CHUNK_ROWS):
        path.write_bytes(b"".join(lines(count)))
        require_the_same(path, memory)
    assert searched(path, memory) == 3 + len(b"".join(lines(COUNT + CHUNK_ROWS)[4 * CHUNK_ROWS :]))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json", "rows.csv"])
def test_files_whose_rows_are_not_their_lines_are_read_whole(tmp_path: Path, memory: DigestMemory, name: str) -> None:
    path = tmp_path / name
    data = b"".join(lines(COUNT))
    as_array = b"[" + data.replace(b"\n", b",")[:-1] + b"]"
    path.write_bytes({".gz": gzip.compress(data), ".json": as_array, ".csv": b"q,r\n" + b"1,2\n" * COUNT}[path.suffix])
    digest = file_digest(path, memory)
    assert digest == blake3(path.read_bytes()).hexdigest()
    assert known_cuts(path, digest, memory) is None


@pytest.mark.parametrize("data", [b"\xff\xfe{\x00}\x00", b'{\n "a": [\n1]}\n'])
def test_a_file_that_cannot_be_read_has_a_digest_all_the_same(
    tmp_path: Path, memory: DigestMemory, data: bytes
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    digest = file_digest(path, memory)
    assert len(digest) == 64
    with pytest.raises(InputError):
        list(raw_chunks(path, known_cuts(path, digest, memory)))
