"""Homes that share a store: what one has made the others fetch, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from registry.home import Home
from tasks.artifacts import Artifact, Store, damage, remove_folder, select
from tasks.digests import DigestMemory, content_digest
from tasks.locks import Interrupted
from tasks.shared_store import SharedStore, _store_at, shared_store
from tasks.steps import Input, Outcome, Step, Work, do
from tests.s3_server import SECRET, S3Server

CALLS: list[str] = []


def write(work: Work) -> dict[str, Any]:
    """A toy step: its `text` behind that of its source; files in a folder, an empty one, a report that differs."""
    CALLS.append(work.step.name)
    text = work.identity["text"]
    if "source" in work.inputs:
        text += (work.inputs["source"] / "deep" / "text.txt").read_text()
    (work.output / "deep").mkdir()
    (work.output / "deep" / "text.txt").write_text(text)
    (work.output / "empty").touch()
    (work.output / "report").mkdir()
    (work.output / "report" / "time.txt").write_text(str(time.time_ns()))
    return {"characters": len(text)}


def write_much(work: Work) -> None:
    """A toy step of many files."""
    for number in range(40):
        (work.output / f"{number:02d}.bin").write_bytes(bytes([number]) * (1 << 20))


def step(name: str = "write", text: str = "a", run: str = "write", source: Step | None = None) -> Step:
    return Step("toy", name, 1, "toy", {"text": text}, {"source": Input(source)} if source else {}, f"{__name__}:{run}")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests of this file."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "root")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """It, empty, and this process pointed to it."""
    remove_folder(running.root / "bucket" / "team")
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLAMATUNER_STORE", running.store)
    CALLS.clear()
    return running


def machine(folder: Path) -> Store:
    """A home of its own, and nothing remembered of what the store said to others."""
    _store_at.cache_clear()
    home = Home(folder)
    folder.mkdir(exist_ok=True)
    return Store(home)


def make(wanted: Step, store: Store, said: list[str] | None = None, here: bool = True) -> Outcome:
    def emit(event: dict[str, Any]) -> None:
        if said is not None and event["kind"] == "note":
            said.append(event["text"])

    return do(wanted, store, DigestMemory(store.home.digests), threading.Event(), emit, here)


def content(artifact: Artifact) -> dict[str, bytes]:
    """All files of an artifact as they are on the disk."""
    return {name: (artifact.path / name).read_bytes() for name in artifact.files}


def test_a_second_machine_computes_nothing_and_has_the_same_bytes(server: S3Server, tmp_path: Path) -> None:
    made = make(step(), machine(tmp_path / "one")).artifact
    said: list[str] = []
    outcome = make(step(), machine(tmp_path / "two"), said)
    assert (outcome.state, outcome.artifact.here, CALLS) == ("cached", True, ["write"])
    assert content(outcome.artifact) == content(made)
    assert damage(outcome.artifact, deep=True) is None
    assert outcome.artifact.manifest == made.manifest
    assert said == ["fetching 0.0 MB from the shared store"]
    assert list((tmp_path / "two" / "work").iterdir()) == []


def test_a_folder_that_machines_mount_serves_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMATUNER_STORE", f"file://{tmp_path}/mounted/store")
    CALLS.clear()
    one, said = machine(tmp_path / "one"), list[str]()
    with pytest.raises(InputError, match="there is no such place"):
        SharedStore(f"file://{tmp_path}/mounted/store").require_usable()
    assert make(step(), one, said).state == "ran"
    assert "cannot be used (FileNotFoundError" in said[0]  # nothing is put where nothing is mounted
    assert not (tmp_path / "mounted").exists()
    (tmp_path / "mounted" / "store").mkdir(parents=True)
    made = make(step(), machine(tmp_path / "one")).artifact
    assert content(make(step(), machine(tmp_path / "two")).artifact) == content(made)
    assert CALLS == ["write"]
    names = {path.name for path in (tmp_path / "mounted").rglob("*") if path.is_file()}
    assert names == {"text.txt", "empty", "time.txt", "manifest.json"}  # nothing half is left


def test_only_what_is_needed_is_fetched(server: S3Server, tmp_path: Path) -> None:
    first = step("first", "a")
    second = step("second", "b", source=first)
    third = step("third", "c", source=second)
    for each in (first, second, third):
        make(each, one := machine(tmp_path / "one"))
    assert len(list(one.home.artifacts.glob("*/*"))) == 3
    two = machine(tmp_path / "two")
    outcomes = [make(each, two, here=each is third) for each in (first, second, third)]
    assert [outcome.state for outcome in outcomes] == ["cached"] * 3
    assert [outcome.artifact.here for outcome in outcomes] == [False, False, True]
    assert [path.parent.name for path in two.home.artifacts.glob("*/*")] == ["third"]
    assert len(CALLS) == 3
    other = make(step("third", "d", source=second), two)  # reads what second made, and nothing of first
    assert (other.artifact.path / "deep" / "text.txt").read_text() == "dba"
    assert sorted(path.parent.name for path in two.home.artifacts.glob("*/*")) == ["second", "third", "third"]
    assert CALLS == ["first", "second", "third", "third"]


@pytest.mark.parametrize("how", ["other bytes", "shorter", "missing", "torn manifest", "a way out"])
def test_what_is_damaged_there_is_refused_made_anew_and_delivered_again(
    server: S3Server, tmp_path: Path, how: str
) -> None:
    source = step("source", "s")
    make(source, one := machine(tmp_path / "one"))
    make(step(source=source), one)
    wanted = "manifest.json" if how in ("torn manifest", "a way out") else "text.txt"
    (file,) = (path for name, path in server.kept().items() if "/write/" in name and path.name == wanted)
    if how == "missing":
        file.unlink()
    elif how == "a way out":
        manifest = json.loads(file.read_text())
        next(each for each in manifest["files"] if each["path"] == "deep/text.txt")["path"] = "../../text.txt"
        manifest["digest"] = content_digest(select(Artifact(Path(), manifest).files, ("*",)))
        file.write_text(json.dumps(manifest))
    else:
        file.write_bytes(file.read_bytes()[:-1] + (b"X" if how == "other bytes" else b""))
    time.sleep(0.5)  # until the server has seen it
    said: list[str] = []
    outcome = make(step(source=source), machine(tmp_path / "two"), said)
    assert (outcome.state, CALLS) == ("ran", ["source", "write", "write"])
    assert damage(outcome.artifact, deep=True) is None
    why = "is damaged; the step is made anew" if wanted == "manifest.json" else "than its sha256 says"
    assert sum(why in text for text in said) == 1, said
    third = make(step(source=source), machine(tmp_path / "three"))
    assert (third.state, content(third.artifact)) == ("cached", content(outcome.artifact))
    assert not list(tmp_path.glob("*/text.txt"))


def test_of_an_upload_that_was_killed_nothing_is_believed(server: S3Server, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from pathlib import Path\nfrom tests.tasks.test_sharing import machine, make, step\n"
        f"make(step('much', run='write_much'), machine(Path({str(tmp_path / 'one')!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while len(server.kept()) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not any(name.endswith("manifest.json") for name in server.kept())
    wanted = step("much", run="write_much")
    two = make(wanted, machine(tmp_path / "two"))
    assert two.state == "ran"
    assert make(wanted, machine(tmp_path / "three")).state == "cached"
    one = machine(tmp_path / "one")
    assert make(wanted, one).state == "cached"  # it was whole there; its delivery alone was lost
    assert len(list(one.home.delivered.glob("*/*"))) == 1


def test_a_download_that_was_stopped_leaves_no_artifact_and_starts_again(server: S3Server, tmp_path: Path) -> None:
    wanted = step("much", run="write_much")
    made = make(wanted, machine(tmp_path / "one")).artifact
    two, stop = machine(tmp_path / "two"), threading.Event()

    def emit(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["step"] > 5 << 20:
            stop.set()

    with pytest.raises(Interrupted):
        do(wanted, two, DigestMemory(two.home.digests), stop, emit)
    assert list(two.home.artifacts.glob("*/*")) == []
    assert content(make(wanted, two).artifact) == content(made)


def test_a_stopped_upload_is_said_and_delivered_by_the_next_run(server: S3Server, tmp_path: Path) -> None:
    wanted, one, stop, said = step("much", run="write_much"), machine(tmp_path / "one"), threading.Event(), []

    def emit(event: dict[str, Any]) -> None:
        said.append(event.get("text"))
        if event["kind"] == "progress":
            stop.set()

    assert do(wanted, one, DigestMemory(one.home.digests), stop, emit).state == "ran"
    assert "stopped before the shared store had it all; the next run delivers it" in said
    assert not any(name.endswith("manifest.json") for name in server.kept())
    assert make(wanted, one).state == "cached"
    assert any(name.endswith("manifest.json") for name in server.kept())


def test_without_an_answer_the_run_goes_on_says_so_once_and_delivers_later(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop()
    said: list[str] = []
    try:
        first, one = step("first", "a"), machine(tmp_path / "one")
        outcomes = [make(each, one, said) for each in (first, step("second", "b", source=first), first)]
        assert [outcome.state for outcome in outcomes] == ["ran", "ran", "cached"]
        assert len(said) == 1
        assert said[0].startswith(f"the shared store {server.store} cannot be used (EndpointConnectionError")
        assert said[0].endswith("the run goes on without it, and what is made here is delivered by a later run")
    finally:
        server.start()
    assert server.kept() == {}
    one = machine(tmp_path / "one")
    assert make(first, one, said).state == "cached"
    assert make(first, machine(tmp_path / "two")).state == "cached"
    assert (len(said), CALLS) == (1, ["first", "second"])


def test_two_that_make_the_same_without_a_lock_never_mix(server: S3Server, tmp_path: Path) -> None:
    one, two = machine(tmp_path / "one"), machine(tmp_path / "two")
    offered = shared_store()
    assert offered is not None
    first = make(step(), one).artifact
    offered.remove("write", first.key)  # as if two had not been told it
    second = make(step(), machine(two.home.path)).artifact
    assert first.digest == second.digest
    assert content(first) != content(second)  # the time in their reports
    third = make(step(), machine(tmp_path / "three"))
    assert (third.state, content(third.artifact)) == ("cached", content(second))


def test_what_a_home_had_before_it_had_a_store_is_delivered_when_it_is_met(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMATUNER_STORE")
    made = make(step(), machine(tmp_path / "one")).artifact
    assert server.kept() == {}
    monkeypatch.setenv("LLAMATUNER_STORE", server.store)
    assert make(step(), machine(tmp_path / "one")).state == "cached"
    assert content(make(step(), machine(tmp_path / "two")).artifact) == content(made)


def test_an_artifact_damaged_here_is_set_aside_and_fetched(server: S3Server, tmp_path: Path) -> None:
    one = machine(tmp_path / "one")
    made = make(step(), one).artifact
    (made.path / "deep" / "text.txt").unlink()
    said: list[str] = []
    again = make(step(), one, said)
    assert (again.state, damage(again.artifact, deep=True), CALLS) == ("cached", None, ["write"])
    assert any("fetched, because the artifact here was damaged: " in text for text in said)
    assert len(list(one.home.damaged.iterdir())) == 1


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:hidden-word@bucket/x",
        "s3://hidden-word@bucket/x",
        "s3://bucket/x?secret=hidden-word",
        "filecache::s3://hidden-word:x@bucket",
        "ftp://me:hidden-word@host:21/x",
    ],
)
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMATUNER_STORE", url)
    with pytest.raises(InputError) as caught:
        shared_store()
    assert "hidden-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("/mnt/store", "Write file:///mnt/store."),
        ("bucket/store", "'bucket/store' is not a URL. Write for example s3://bucket/folder."),
        ("nothing://bucket/store", "Protocol not known: nothing"),
        ("gs://bucket/store", "the package for gs:// is not installed. pip install gcsfs=="),
        ("abfs://place@account.dfs.core.windows.net/x", "pip install adlfs"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_cure(url: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMATUNER_STORE", url)
    with pytest.raises(InputError) as caught:
        shared_store()
    assert wanted in str(caught.value)


def test_a_place_that_is_not_there_and_one_that_says_no_are_refused(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    SharedStore(server.store).require_usable()  # nobody has written to it yet
    with pytest.raises(InputError, match="s3://elsewhere/x: there is no such place"):
        SharedStore("s3://elsewhere/x").require_usable()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    refused = SharedStore(server.store)
    refused._fs.clear_instance_cache()
    with pytest.raises(InputError, match="may not be read: PermissionError"):
        SharedStore(server.store).require_usable()


def test_no_secret_is_in_what_is_kept_or_said(server: S3Server, tmp_path: Path) -> None:
    said: list[str] = []
    one = machine(tmp_path / "one")
    make(step(), one, said)
    texts = [path.read_bytes() for path in (*server.kept().values(), *one.home.path.rglob("*")) if path.is_file()]
    assert not any(SECRET.encode() in text for text in [*texts, json.dumps(said).encode()])


def test_without_a_store_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.tasks.test_sharing import make, step\n"
        "from registry.home import Home\nfrom tasks.artifacts import Store\n"
        f"home = Home(Path({str(tmp_path / 'one')!r}))\nhome.path.mkdir()\n"
        "print(make(step(), Store(home)).state, 'fsspec' in sys.modules, [p.name for p in home.path.glob('deliv*')])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LLAMATUNER_STORE"}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], env=environment
    )
    assert answer.stdout.split("\n")[0] == "ran False []"
