"""A step is done once, whole or not at all, and found again by what it was made from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from registry.home import Home
from tasks.artifacts import Store, damage
from tasks.digests import DigestMemory
from tasks.explain import nearest
from tasks.locks import Interrupted, locked
from tasks.manifests import version_drift
from tasks.steps import Input, LocalFolder, Outcome, Step, Work, do, prepare

CALLS: list[str] = []


def write(work: Work) -> dict[str, Any]:
    """A toy step: writes its `text`, upper-cased when asked."""
    CALLS.append(work.step.name)
    text = work.identity["text"]
    if "source" in work.inputs:
        text += (work.inputs["source"] / "text.txt").read_text()
    (work.output / "text.txt").write_text(text)
    (work.output / "report").mkdir()
    (work.output / "report" / "time.txt").write_text(str(time.time_ns()))
    return {"characters": len(text)}


def fail(work: Work) -> None:
    """A toy step that writes half of its output and fails."""
    (work.output / "half.txt").write_text("half")
    raise RuntimeError("broken")


def step(
    name: str = "write", text: str = "a", run: str = "write", source: Step | LocalFolder | None = None, **more: Any
) -> Step:
    inputs = {"source": Input(source)} if source else {}
    return Step("toy", name, 1, "toy", {"text": text}, inputs, f"{__name__}:{run}", **more)


@pytest.fixture
def store(home: Path) -> Store:
    CALLS.clear()
    return Store(Home.open())


def make(wanted: Step, store: Store) -> Outcome:
    return do(wanted, store, DigestMemory(store.home.digests), threading.Event(), lambda event: None)


def test_the_second_time_is_a_hit(store: Store) -> None:
    assert make(step(), store).state == "ran"
    assert make(step(), store).state == "cached"
    assert CALLS == ["write"]


def test_settings_step_version_and_packages_change_the_key_and_runtime_does_not(store: Store) -> None:
    memory = DigestMemory(store.home.digests)

    def key(wanted: Step) -> str:
        ready = prepare(wanted, store, memory)
        assert ready
        return ready.key

    same = step()
    assert key(step(runtime={"logging_steps": 5})) == key(same)
    assert key(step(devices=1)) == key(same)
    assert key(step(text="b")) != key(same)
    assert key(step(packages=("jinja2",))) != key(same)
    assert key(step(strict_versions=True)) != key(same)
    assert key(Step("toy", "write", 2, "toy", {"text": "a"}, {}, same.run)) != key(same)


def test_the_report_is_kept_but_is_not_part_of_the_digest(store: Store) -> None:
    first = make(step(), store).artifact
    assert "report/time.txt" in first.files
    for path in store.home.artifacts.glob("write/*"):
        (path / "text.txt").unlink()
    assert make(step(), store).artifact.digest == first.digest


def test_an_input_rebuilt_to_the_same_bytes_leaves_everything_behind_it_a_hit(store: Store) -> None:
    source = step("source", "a")
    make(source, store)
    made = make(step("after", "b", source=source), store).artifact
    (store.find("source", prepare(source, store, DigestMemory(store.home.digests)).key).path / "text.txt").unlink()  # type: ignore[union-attr]
    assert make(source, store).state == "ran"
    again = make(step("after", "b", source=source), store)
    assert (again.state, again.artifact.key) == ("cached", made.key)


def test_a_failed_step_leaves_no_artifact(store: Store) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        make(step(run="fail"), store)
    assert list(store.home.artifacts.glob("*/*")) == []
    assert make(step(), store).state == "ran"


def test_a_work_folder_left_by_a_kill_after_the_last_rename_is_removed(store: Store) -> None:
    made = make(step(), store)
    left = store.work_folder("write", made.artifact.key) / "scratch"
    left.mkdir(parents=True)
    again = make(step(), store)
    assert (again.state, again.artifact.digest) == ("cached", made.artifact.digest)
    assert not left.parent.exists()


@pytest.mark.parametrize("how", ["missing", "shorter", "no manifest", "torn manifest"])
def test_a_damaged_artifact_is_set_aside_and_made_again(store: Store, how: str) -> None:
    artifact = make(step(text="abc"), store).artifact
    file = artifact.path / ("manifest.json" if "manifest" in how else "text.txt")
    if how in ("missing", "no manifest"):
        file.unlink()
    else:
        file.write_text(file.read_text()[:2])
    said: list[str] = []
    outcome = do(
        step(text="abc"), store, DigestMemory(store.home.digests), threading.Event(), lambda e: said.append(e["text"])
    )
    assert outcome.state == "ran"
    assert "damaged" in said[0]
    assert len(list(store.home.damaged.iterdir())) == 1
    assert damage(outcome.artifact, deep=True) is None


def test_changed_bytes_of_equal_length_are_found_by_verify(store: Store) -> None:
    artifact = make(step(text="abc"), store).artifact
    (artifact.path / "text.txt").write_text("abd")
    assert damage(artifact) is None
    assert "sha256" in str(damage(artifact, deep=True))


def test_a_moved_home_keeps_its_hits(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = step("source")
    make(source, store)
    make(step("after", source=source), store)
    store.home.path.rename(tmp_path / "moved")
    monkeypatch.setenv("LLAMATUNER_HOME", str(tmp_path / "moved"))
    moved = Store(Home.open())
    assert make(source, moved).state == "cached"
    assert make(step("after", source=source), moved).state == "cached"


def test_a_local_folder_counts_by_its_bytes(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "text.txt").write_text("x")
    first = make(step(source=LocalFolder(folder)), store).artifact
    os.utime(folder / "text.txt", (1, 1))
    folder.rename(tmp_path / "renamed")
    assert make(step(source=LocalFolder(tmp_path / "renamed")), store).artifact.key == first.key
    (tmp_path / "renamed" / "text.txt").write_text("y")
    assert make(step(source=LocalFolder(tmp_path / "renamed")), store).state == "ran"


def test_an_artifact_that_serves_as_a_folder_is_the_same_input(store: Store) -> None:
    source = step("source")
    folder = make(source, store).artifact.path
    made = make(step(source=source), store).artifact
    assert make(step(source=LocalFolder(folder)), store).artifact.key == made.key


def test_a_part_of_an_input_is_all_that_counts(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "text.txt").write_text("x")
    (folder / "weights.bin").write_text("1")

    def partly() -> Step:
        return Step(
            "toy", "write", 1, "toy", {"text": ""}, {"source": Input(LocalFolder(folder), ("*.txt",))}, step().run
        )

    make(partly(), store)
    (folder / "weights.bin").write_text("2")
    assert make(partly(), store).state == "cached"


def test_a_miss_is_explained_by_the_fields_that_changed(store: Store) -> None:
    make(step(text="a"), store)
    ready = prepare(step(text="b"), store, DigestMemory(store.home.digests))
    assert ready
    found = nearest(ready, "toy", list(store.all()))
    assert found
    assert found[1] == ["text a → b"]


def test_the_manifest_says_what_it_was_made_from(store: Store) -> None:
    source = step("source")
    make(source, store)
    manifest = json.loads((make(step("after", source=source), store).artifact.path / "manifest.json").read_text())
    assert manifest["identity"] == {"text": "a"}
    assert manifest["inputs"]["source"]["artifact"].startswith("source/toy-")
    assert {"key", "digest", "files", "packages", "git_commit", "argv", "counts", "seconds"} <= manifest.keys()
    assert version_drift(make(step(), store).artifact) == []


def test_two_threads_that_want_one_step_make_it_once(store: Store) -> None:
    threads = [threading.Thread(target=make, args=(step(), store)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert CALLS == ["write"]


def test_a_stop_request_ends_the_wait_for_a_lock(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with locked(tmp_path / "lock"), pytest.raises(Interrupted), locked(tmp_path / "lock", stop):
        pass


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tasks.locks import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with locked(tmp_path / "lock"):
        assert time.monotonic() - began < 5
