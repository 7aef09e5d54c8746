"""Chunks of data steps: what is made anew, what is shared, and what is not believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from registry.home import Home
from tasks.artifacts import Artifact, Store, damage
from tasks.chunks import Chunk, ChunkCache, forget, link, remove_unused
from tasks.raw_rows import CHUNK_ROWS
from tasks.workers import make_chunks
from tests.tasks.test_data_steps import make, question, sequences, steps_of, write
from tests.tiny import tiny_model

STEPS = ("fetch", "render", "tokenize")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def questions(count: int) -> list[dict[str, str]]:
    return [question(f"q{n}", f"a{n} {'x' * (n % 7)}") for n in range(count)]


def chunks(kind: str) -> dict[str, tuple[int, int]]:
    """Finished chunks of a kind: name → (inode, time of the last change)."""
    found = {}
    for path in (Home.open().chunks / kind).rglob("*"):
        if path.is_file() and path.suffix != ".json":
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def made_anew(model: Path, data: Any, **stage: Any) -> tuple[dict[str, Artifact], dict[str, int]]:
    """Artifacts, and how many chunks each step had to make; those that there were are untouched."""
    before = {kind: chunks(kind) for kind in STEPS}
    made = make(steps_of(model, data, **stage))
    after = {kind: chunks(kind) for kind in STEPS}
    for kind in STEPS:
        assert before[kind].items() <= after[kind].items()
    return made, {kind: len(after[kind]) - len(before[kind]) for kind in STEPS}


def digests(made: dict[str, Artifact]) -> dict[str, str]:
    return {name: artifact.digest for name, artifact in made.items()}


def fresh(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Go on in another home."""
    monkeypatch.setenv("LLAMATUNER_HOME", str(path))


def test_rows_added_to_a_file_cost_the_last_chunk_and_the_new_ones(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = questions(2 * CHUNK_ROWS + 700)
    data = write(tmp_path / "rows.jsonl", *rows[: CHUNK_ROWS + 10])
    assert made_anew(model, data)[1] == dict.fromkeys(STEPS, 2)
    made, count = made_anew(model, write(data, *rows))
    assert count == dict.fromkeys(STEPS, 2)  # the one of ten rows, now full, and one more
    assert [row["rows"] for row in sequences(made["tokenize"])] == [[n] for n in range(len(rows))]
    fresh(monkeypatch, tmp_path / "other")
    assert digests(make(steps_of(model, data))) == digests(made)


@pytest.mark.parametrize(
    ("change", "count"),
    [("inserted", 3), ("removed", 2), ("cut off", 1), ("chunk inserted", 3), ("without an end", 0)],
)
def test_rows_inserted_or_removed_give_what_a_first_preparation_gives(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, count: int
) -> None:
    rows = questions(2 * CHUNK_ROWS + 10)
    data = write(tmp_path / "rows.jsonl", *rows)
    made_anew(model, data)
    if change == "inserted":
        rows.insert(CHUNK_ROWS // 2, question("new", "row"))
    elif change == "removed":
        del rows[CHUNK_ROWS + 7]
    elif change == "cut off":
        del rows[CHUNK_ROWS + 7 :]
    elif change == "chunk inserted":  # what is behind it is the same, and has other numbers
        rows[CHUNK_ROWS:CHUNK_ROWS] = [question(f"new{n}", "row") for n in range(CHUNK_ROWS)]
    write(data, *rows)
    if change == "without an end":
        data.write_bytes(data.read_bytes()[:-1])
    made, counts = made_anew(model, data)
    assert counts == dict.fromkeys(STEPS, count)
    fresh(monkeypatch, tmp_path / "other")
    assert digests(make(steps_of(model, data))) == digests(made)


def test_a_file_rewritten_between_plan_and_run_is_not_taken_for_the_planned_one(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *questions(5))
    planned = steps_of(model, data)
    write(data, *questions(4), question("new", "row"))
    with pytest.raises(InputError, match=r"rows.jsonl: other bytes than when it was looked at"):
        make(planned)
    assert make(steps_of(model, data))["tokenize"].manifest["counts"]["rows"] == 5


@pytest.mark.parametrize("place", [0, CHUNK_ROWS, 2 * CHUNK_ROWS + 5])
def test_one_changed_row_costs_its_chunk(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    rows = questions(2 * CHUNK_ROWS + 10)
    data = write(tmp_path / "rows.jsonl", *rows)
    first, _ = made_anew(model, data)
    rows[place] = question("changed", "so that it is another")
    made, count = made_anew(model, write(data, *rows))
    assert count == dict.fromkeys(STEPS, 1)
    assert made["tokenize"].digest != first["tokenize"].digest
    fresh(monkeypatch, tmp_path / "other")
    assert digests(make(steps_of(model, data))) == digests(made)


def test_recipes_with_a_data_set_in_common_share_its_chunks(model: Path, tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", *questions(count)) for name, count in (("one", 30), ("two", 40)))
    made_anew(model, one)
    both, count = made_anew(model, [two, one])
    assert count == dict.fromkeys(STEPS, 1)
    assert both["tokenize"].manifest["counts"]["rows"] == 70
    assert made_anew(model, one, packing=True, cutoff_len=300)[1] == {"fetch": 0, "render": 0, "tokenize": 1}
    assert made_anew(model, one, cutoff_len=300)[1] == dict.fromkeys(STEPS, 0)  # packing writes no tokens
    assert made_anew(model, one, bad_rows="skip")[1] == dict.fromkeys(STEPS, 0)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    files = [write(tmp_path / f"{n}.jsonl", *questions(60 + n), "torn {") for n in range(5)]
    more = {"preprocessing_num_workers": workers, "bad_rows": "skip", "val_size": 0.2}
    made = digests(make(steps_of(model, files, **more)))
    fresh(monkeypatch, tmp_path / "other")
    assert made == digests(make(steps_of(model, files, **more | {"preprocessing_num_workers": 1})))


@pytest.mark.parametrize("kind", STEPS)
def test_a_damaged_chunk_behind_a_damaged_artifact_is_not_believed(model: Path, tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "rows.jsonl", *questions(50))
    first = make(steps_of(model, data))
    artifact = first[kind]
    file = next(path for path in sorted(artifact.path.rglob("*.arrow")) if path.name != "sequences.arrow")
    assert file.stat().st_nlink == 2
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    with file.open("r+b") as handle:  # in place: the chunk has the same bytes
        handle.write(content)
    assert damage(artifact, deep=True) is not None
    next(path for path in artifact.path.rglob("*.json") if path.parent == artifact.path).unlink()  # found by size, too
    again = make(steps_of(model, data))
    assert digests(again) == digests(first)
    assert all(damage(one, deep=True) is None for one in again.values())


@pytest.mark.parametrize("kind", STEPS)
def test_chunks_of_an_artifact_found_damaged_are_forgotten(model: Path, tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "rows.jsonl", *questions(50))
    first = make(steps_of(model, data))
    before = {name: chunks(name) for name in STEPS}
    forget(Home.open(), first[kind].path)
    assert {name: len(chunks(name)) for name in STEPS} == {name: int(name != kind) for name in STEPS}
    shutil.rmtree(first[kind].path)
    assert digests(make(steps_of(model, data))) == digests(first)
    assert chunks(kind) != before[kind]


@pytest.mark.parametrize("lost", ["data", "description", "half a description", "a byte"])
def test_a_chunk_that_is_not_whole_is_made_again(lost: str) -> None:
    cache = ChunkCache(Home.open(), "echo")
    chunk = Chunk("ab" * 32, {}, b"payload")
    (first,) = make_chunks("tests.tasks.makers:Echo", {"mark": 1}, [chunk], cache)
    description = first.path.with_name(f"{first.path.name}.json")
    if lost == "data":
        first.path.unlink()
    elif lost == "description":
        description.unlink()
    elif lost == "a byte":
        first.path.write_bytes(first.path.read_bytes()[:-1])
    else:
        description.write_text(description.read_text()[:20])
    assert cache.find(chunk.key) is None
    (again,) = make_chunks("tests.tasks.makers:Echo", {"mark": 1}, [chunk], cache)
    assert (again.sha256, again.reused) == (first.sha256, False)
    assert cache.find(chunk.key) is not None


def test_a_deep_look_finds_a_chunk_with_other_bytes() -> None:
    home, chunk = Home.open(), Chunk("ab" * 32, {}, b"payload")
    (made,) = make_chunks("tests.tasks.makers:Echo", {"mark": 1}, [chunk], ChunkCache(home, "echo"))
    made.path.write_bytes(made.path.read_bytes()[::-1])
    assert ChunkCache(home, "echo").find(chunk.key) is not None
    assert ChunkCache(home, "echo", deep=True).find(chunk.key) is None


def test_unused_chunks_are_those_that_no_artifact_links_to(tmp_path: Path) -> None:
    home = Home.open()
    cache, artifact = ChunkCache(home, "echo"), tmp_path / "home" / "artifacts"
    given = [Chunk(f"{n:02d}" * 32, {}, b"x" * n) for n in range(3)]
    made = make_chunks("tests.tasks.makers:Echo", {"mark": 1}, given, cache)
    artifact.mkdir()
    link(made[1], artifact / "one")
    leftover = made[0].path.with_name(f"{made[0].path.name}.1.2.part")
    leftover.write_bytes(b"half")
    size = made[0].size + made[2].size + 4
    assert remove_unused(home, dry_run=True) == (3, size)
    assert remove_unused(home, [artifact], dry_run=True) == (4, size + made[1].size)
    assert [cache.find(one.key) is not None for one in given] == [True, True, True]
    assert remove_unused(home) == (3, size)
    assert [cache.find(one.key) is not None for one in given] == [False, True, False]
    assert sorted(path.name for path in home.chunks.rglob("*") if path.is_file()) == [
        made[1].path.name,
        f"{made[1].path.name}.json",
    ]
    assert (artifact / "one").read_bytes() == b"x1"
    assert remove_unused(home) == (0, 0)


def test_artifacts_stay_whole_when_their_chunks_are_gone(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *questions(50))
    first = make(steps_of(model, data))
    shutil.rmtree(Home.open().chunks)
    assert all(damage(one, deep=True) is None for one in Store(Home.open()).all())
    assert digests(make(steps_of(model, data))) == digests(first)
    assert json.loads((first["tokenize"].path / "state.json").read_text())["_data_files"]
