"""The commands that look at what is stored, check it and clean it up; each gives one JSON line when asked to."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from flows.graph import build
from flows.run_records import RunRecord
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Store
from tasks.digests import DigestMemory
from tasks.steps import Outcome, do

ONE, TWO = "stages.sft.cutoff_len=160", "stages.sft.cutoff_len=128"
Capture = pytest.CaptureFixture[str]


def make_data(recipe: Path, *settings: str) -> list[Outcome]:
    """Make the data steps of a recipe, without a server."""
    home = Home.open()
    steps = build(load_recipe(str(recipe), settings), home).data_only().steps
    store, memory = Store(home), DigestMemory(home.digests)
    return [do(step, store, memory, threading.Event(), lambda _: None) for step in steps]


def record_run(recipe: str, outcomes: list[Outcome], status: str = "completed") -> RunRecord:
    """Leave a record of a run that ended with these artifacts."""
    record = RunRecord.start(Home.open(), recipe)
    steps = [{"stage": "sft", "step": o.artifact.step, "state": "ran", "key": o.artifact.key} for o in outcomes]
    if status == "running":
        record.update(steps=steps)
    else:
        record.end(status, steps=steps)
    return record


def ask(capsys: Capture, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The one JSON line of a command."""
    capsys.readouterr()
    assert run_app([*arguments, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.fixture
def two(folder: Path) -> tuple[list[Outcome], list[Outcome]]:
    """A home with the data steps of two recipes that differ in cutoff_len: six artifacts, and two more."""
    return make_data(folder / "toy.json", ONE), make_data(folder / "toy.json", TWO)


def names(home: Path) -> set[str]:
    """`step/folder` of what is stored."""
    return {f"{path.parent.name}/{path.name}" for path in (home / "artifacts").glob("*/*")}


def test_ls_lists_all_newest_first_and_says_what_is_damaged(
    two: tuple[list[Outcome], list[Outcome]], capsys: Capture
) -> None:
    listed = ask(capsys, "artifacts", "ls")["artifacts"]
    assert len(listed) == 8
    assert [line["created"] for line in listed] == sorted((line["created"] for line in listed), reverse=True)
    assert {line["state"] for line in listed} == {"whole"}
    assert {line["step"]: line["size"] > 0 for line in listed} == {"fetch": True, "render": True, "tokenize": True}
    next(two[0][0].artifact.path.rglob("*.arrow")).unlink()
    states = [line["state"] for line in ask(capsys, "artifacts", "ls")["artifacts"]]
    assert sorted(states)[0] == "rows/00000.arrow is missing"
    run_app(["artifacts", "ls"])
    assert "damaged: rows/00000.arrow is missing" in capsys.readouterr().out


def test_show_gives_the_manifest_by_key_or_by_name(two: tuple[list[Outcome], list[Outcome]], capsys: Capture) -> None:
    artifact = two[0][0].artifact
    shown = ask(capsys, "artifacts", "show", artifact.key[:12])
    assert shown["key"] == artifact.key
    assert shown["identity"]["bad_rows"] == "fail"
    assert ask(capsys, "artifacts", "show", artifact.path.name) == shown
    assert ask(capsys, "artifacts", "show", f"fetch/{artifact.path.name}") == shown


def test_a_key_that_is_unknown_or_that_several_begin_with_is_refused(
    two: tuple[list[Outcome], list[Outcome]], capsys: Capture
) -> None:
    for command in ("show", "why", "verify"):
        answer = ask(capsys, "artifacts", command, "zzz", code=2)
        assert answer["error"] == "artifacts: no artifact begins with 'zzz'. See `llamatuner artifacts ls`."
    assert "8 artifacts begin with ''" in ask(capsys, "artifacts", "show", "", code=2)["error"]


def test_why_names_the_setting_that_differs(two: tuple[list[Outcome], list[Outcome]], capsys: Capture) -> None:
    first, second = (
        next(o.artifact for o in outcomes if o.artifact.path.match("tokenize/train-*")) for outcomes in two
    )
    answer = ask(capsys, "artifacts", "why", second.key)
    assert (answer["nearest"], answer["why"]) == (first.key, ["cutoff_len 160 → 128"])


def test_verify_finds_one_changed_byte(two: tuple[list[Outcome], list[Outcome]], capsys: Capture) -> None:
    assert ask(capsys, "artifacts", "verify")["damaged"] == 0
    artifact = two[1][-1].artifact
    shard = next(artifact.path.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    answer = ask(capsys, "artifacts", "verify", code=1)
    assert answer["damaged"] == 1
    found = {line["key"]: line["damage"] for line in answer["artifacts"] if line["damage"]}
    assert found == {artifact.key: f"{shard.name} has other content than its sha256 says"}
    assert ask(capsys, "artifacts", "verify", artifact.key[:12], code=1)["damaged"] == 1
    assert ask(capsys, "artifacts", "verify", two[0][0].artifact.key[:12])["damaged"] == 0


def test_gc_keeps_what_recent_runs_refer_to_and_removes_the_rest(
    two: tuple[list[Outcome], list[Outcome]], home: Path, capsys: Capture
) -> None:
    record_run("toy", two[1])
    kept = {f"{o.artifact.step}/{o.artifact.path.name}" for o in two[1]}
    gone = names(home) - kept
    assert len(gone) == 2
    (home / "work" / "fetch-0123456789ab").mkdir(parents=True)
    (home / "work" / "fetch-0123456789ab" / "half").write_text("half")
    before = names(home)
    tried = ask(capsys, "artifacts", "gc", "--dry-run")
    assert set(tried["removed"]) == {f"artifacts/{name}" for name in gone} | {"work/fetch-0123456789ab"}
    assert (names(home), tried["dry_run"]) == (before, True)
    assert (home / "work" / "fetch-0123456789ab").exists()
    done = ask(capsys, "artifacts", "gc")
    assert (done["removed"], done["bytes"]) == (tried["removed"], tried["bytes"])
    assert names(home) == kept
    assert list((home / "work").iterdir()) == []
    assert ask(capsys, "artifacts", "verify")["damaged"] == 0


def chunk_files(home: Path) -> set[str]:
    """Finished chunks, by step and name."""
    found = (home / "chunks").rglob("*")
    return {f"{path.parts[-3]}/{path.name}" for path in found if path.is_file() and path.suffix != ".json"}


def test_gc_removes_the_chunks_that_no_kept_artifact_has(
    two: tuple[list[Outcome], list[Outcome]], home: Path, capsys: Capture
) -> None:
    record_run("toy", two[1])
    before = chunk_files(home)
    gone = [o.artifact for o in two[0] if o.artifact.path not in [other.artifact.path for other in two[1]]]
    tried = ask(capsys, "artifacts", "gc", "--dry-run")
    assert chunk_files(home) == before
    done = ask(capsys, "artifacts", "gc")
    assert (done["chunks"], done["bytes"]) == (tried["chunks"], tried["bytes"])
    assert done["chunks"] == len(before) - len(chunk_files(home)) == len(gone) == 2
    assert done["bytes"] > max(artifact.size for artifact in gone)
    assert {name.split("/")[0] for name in chunk_files(home)} == {"fetch", "render", "tokenize"}
    record_run("toy", make_data(home.parent / "recipe" / "toy.json", TWO))
    assert ask(capsys, "artifacts", "gc")["chunks"] == 0
    assert ask(capsys, "artifacts", "gc", "--keep-runs", "0")["chunks"] == len(before) - 2
    assert chunk_files(home) == set()


def test_what_verify_finds_damaged_is_made_again_of_other_chunks(
    two: tuple[list[Outcome], list[Outcome]], home: Path, capsys: Capture
) -> None:
    artifact = two[1][-1].artifact
    shard = next(path for path in artifact.path.glob("data-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)  # in place: the finished chunk has the same bytes
    assert ask(capsys, "artifacts", "verify", code=1)["damaged"] == 1
    shutil.rmtree(artifact.path)
    again = make_data(home.parent / "recipe" / "toy.json", TWO)
    assert again[-1].artifact.digest == artifact.digest
    assert ask(capsys, "artifacts", "verify")["damaged"] == 0


def test_gc_counts_runs_of_each_recipe_by_itself(
    two: tuple[list[Outcome], list[Outcome]], home: Path, capsys: Capture
) -> None:
    record_run("one", two[0])
    record_run("two", two[1], "failed")
    assert ask(capsys, "artifacts", "gc", "--keep-runs", "1")["removed"] == []
    assert len(ask(capsys, "artifacts", "gc", "--keep-runs", "0")["removed"]) == 8
    assert names(home) == set()


def test_gc_refuses_while_a_run_is_going_on_and_not_after_it_died(
    two: tuple[list[Outcome], list[Outcome]], home: Path, capsys: Capture
) -> None:
    record = record_run("toy", two[1], "running")
    before = names(home)
    answer = ask(capsys, "artifacts", "gc", code=2)
    assert answer["error"].startswith(f"artifacts gc: run {record.values['id']} is going on. Wait for it, or stop it")
    assert names(home) == before
    record._alive.close()  # as the end of its process would
    assert len(ask(capsys, "artifacts", "gc")["removed"]) == 2


def test_a_home_without_anything_is_no_error(capsys: Capture) -> None:
    assert ask(capsys, "artifacts", "ls") == {"artifacts": []}
    assert ask(capsys, "artifacts", "verify") == {"artifacts": [], "damaged": 0}
    assert ask(capsys, "artifacts", "gc") == {"removed": [], "chunks": 0, "bytes": 0, "dry_run": False}
    assert ask(capsys, "runs") == {"runs": []}


def test_runs_shows_the_newest_and_what_died(two: tuple[list[Outcome], list[Outcome]], capsys: Capture) -> None:
    record_run("toy", two[0], "failed")
    record_run("toy", two[1], "running")._alive.close()
    states = [run["status"] for run in ask(capsys, "runs")["runs"]]
    assert sorted(states) == ["crashed", "failed"]
    assert len(ask(capsys, "runs", "--limit", "1")["runs"]) == 1


def test_a_damaged_record_of_a_run_is_named(home: Path, capsys: Capture) -> None:
    (home / "runs").mkdir(parents=True)
    (home / "runs" / "20250101.json").write_text("{")
    assert "runs/20250101.json: a damaged record of a run" in ask(capsys, "runs", code=2)["error"]


@pytest.mark.parametrize("kind", ["models", "datasets", "stages", "methods", "templates", "recipes"])
def test_list_describes_every_entry(capsys: Capture, kind: str) -> None:
    entries = ask(capsys, "list", kind)[kind]
    assert entries
    assert all(entries.values())
    assert ask(capsys, "list")[kind] == entries


def test_version_says_the_version(capsys: Capture) -> None:
    assert set(ask(capsys, "version")) == {"version", "git_commit"}


@pytest.mark.parametrize("as_json", [True, False])
def test_env_shows_no_token_and_no_password(monkeypatch: pytest.MonkeyPatch, capsys: Capture, as_json: bool) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PREFECT_API_KEY", "pnu_secret")
    monkeypatch.setenv("PREFECT_API_URL", "https://me:pass_secret@prefect.example/api")
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", "postgresql://me:p%40ss_secret@db.example:5432/runs?password=query_secret"
    )
    assert run_app(["env", *(["--json"] if as_json else [])]) == 0
    said = "".join(capsys.readouterr())
    assert "secret" not in said
    assert "https://prefect.example/api" in said
    assert "postgresql://db.example:5432/runs" in said
