"""Worker processes: what they make, how they end, and that nothing of a failed or killed one is left."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from registry.errors import InputError
from registry.home import Home
from tasks.chunks import Chunk, ChunkCache, Made
from tasks.launch import ProgramFailed
from tasks.locks import Interrupted
from tasks.workers import FEW_CHUNKS, WORKERS, make_chunks

ECHO = "tests.tasks.makers:Echo"


@pytest.fixture
def cache() -> ChunkCache:
    return ChunkCache(Home.open(), "echo")


def chunk(number: int, **task: Any) -> Chunk:
    return Chunk(hashlib.sha256(f"chunk {number}".encode()).hexdigest(), task, f"payload {number}\n".encode() * 9)


def make(chunks: Any, cache: ChunkCache, workers: int = 2, **more: Any) -> list[Made]:
    return make_chunks(ECHO, {"mark": "m"}, chunks, cache, workers, **more)


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What the condition gives, as soon as it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def number_in(path: Path) -> int:
    """The number in a file; 0 as long as it is not there."""
    return int(path.read_text() or 0) if path.exists() else 0


class AtTheFirst:
    """Sets a stop as soon as it is told of a chunk; knows when that was."""

    def __init__(self) -> None:
        self.stop, self.asked = threading.Event(), 0.0

    def __call__(self, _: Made) -> None:
        if not self.stop.is_set():
            self.asked = time.monotonic()
            self.stop.set()

    def seconds(self) -> float:
        return time.monotonic() - self.asked


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_chunks_come_in_order_and_are_the_same_whoever_makes_them(cache: ChunkCache, workers: int) -> None:
    slow_first = [chunk(number, seconds=0.1 if number == 0 else 0) for number in range(12)]
    told: list[Path] = []
    made = make(slow_first, cache, workers, on_made=lambda one: told.append(one.path))
    assert [one.path.read_bytes() for one in made] == [given.payload + b"m" for given in slow_first]
    assert [one.sha256 for one in made] == [hashlib.sha256(given.payload + b"m").hexdigest() for given in slow_first]
    assert told == [one.path for one in made]
    assert {one.report["letter"] for one in made} == {"é🙂"}
    pids = {one.report["pid"] for one in made}
    assert (os.getpid() in pids, len(pids) <= max(workers, 3)) == (workers == 1, True)
    again = make(slow_first, cache, workers)
    assert [(one.sha256, one.report, one.reused) for one in again] == [(o.sha256, o.report, True) for o in made]
    assert not list(cache.folder.rglob("*.part"))


def test_a_handful_of_chunks_is_made_without_workers_unless_they_run(cache: ChunkCache) -> None:
    WORKERS.close()
    made = make([chunk(number) for number in range(FEW_CHUNKS)], cache)
    assert {one.report["pid"] for one in made} == {os.getpid()}
    make([chunk(number) for number in range(10, 20)], cache)
    (made_by_worker,) = make([chunk(20)], cache)
    assert made_by_worker.report["pid"] != os.getpid()


def test_payloads_of_chunks_that_are_there_are_let_go(cache: ChunkCache) -> None:
    make([chunk(number) for number in range(40)], cache)
    alive = 0

    class Payload(bytes):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def chunks() -> Iterator[Chunk]:
        nonlocal alive
        for number in range(40):
            given = chunk(number)
            alive += 1
            yield Chunk(given.key, given.task, Payload(given.payload))
            del given
            assert alive <= 3

    assert all(one.reused for one in make(chunks(), cache))


@pytest.mark.parametrize("count", [2, 10])
def test_what_a_maker_refuses_arrives_whole_and_what_was_made_before_is_kept(cache: ChunkCache, count: int) -> None:
    given = [chunk(number, **({"refuse": "é"} if number == count - 1 else {})) for number in range(count)]
    with pytest.raises(InputError) as raised:
        make(given, cache)
    assert [(p.where, p.rule, p.cure) for p in raised.value.problems] == [
        ("a.jsonl, line 3", "not é", "Mend it."),
        ("b", "c", ""),
    ]
    assert raised.value.title == "data"
    assert all(cache.find(each.key) for each in given[:-1])
    assert cache.find(given[-1].key) is None
    assert not list(cache.folder.rglob("*.part"))


def test_a_failure_in_a_worker_says_what_it_was(cache: ChunkCache) -> None:
    with pytest.raises(ProgramFailed, match="seven") as raised:
        make([chunk(number, fail="seven") for number in range(8)], cache)
    assert raised.value.kind == "unexpected"


def test_a_worker_killed_at_a_chunk_fails_the_step_and_the_next_call_works(cache: ChunkCache, tmp_path: Path) -> None:
    started = tmp_path / "started"
    given = [chunk(0, seconds=30, started=str(started)), *(chunk(number) for number in range(1, 8))]
    killer = threading.Thread(target=lambda: os.kill(wait_for(lambda: number_in(started)), signal.SIGKILL))
    killer.start()
    with pytest.raises(ProgramFailed, match="ended with exit code -9") as raised:
        make(given, cache)
    killer.join()
    assert raised.value.kind == "killed"
    assert cache.find(given[0].key) is None
    made = make([chunk(number) for number in range(8)], cache)
    assert [one.path.read_bytes() for one in made] == [chunk(number).payload + b"m" for number in range(8)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_ends_the_work_within_two_seconds_and_keeps_what_is_made(cache: ChunkCache, workers: int) -> None:
    stopper = AtTheFirst()
    given = [chunk(number, seconds=0.2) for number in range(60)]
    with pytest.raises(Interrupted):
        make(given, cache, workers, on_made=stopper, stop=stopper.stop)
    assert stopper.seconds() < 2.0
    kept = [each for each in given if cache.find(each.key)]
    assert 1 <= len(kept) <= 1 + 2 * workers
    made = make(given[: len(kept) + 2], cache, workers)
    assert [one.reused for one in made][: len(kept)] == [True] * len(kept)


def test_a_stop_does_not_wait_for_a_long_chunk(cache: ChunkCache, tmp_path: Path) -> None:
    stop, started, asked = threading.Event(), tmp_path / "started", [0.0]
    given = [chunk(number, seconds=30, started=str(started)) for number in range(6)]

    def stop_it() -> None:
        wait_for(lambda: number_in(started))
        asked[0] = time.monotonic()
        stop.set()

    stopper = threading.Thread(target=stop_it)
    stopper.start()
    with pytest.raises(Interrupted):
        make(given, cache, stop=stop)
    stopper.join()
    assert time.monotonic() - asked[0] < 2.0
    assert [one.reused for one in make([chunk(number) for number in range(6)], cache)] == [False] * 6
    assert not list(cache.folder.rglob("*.part"))


PARENT = """
import sys
from pathlib import Path
from registry.home import Home
from tasks.chunks import Chunk, ChunkCache
from tasks.workers import make_chunks
chunks = [Chunk(f"{n:064x}", {"seconds": 1, "started": sys.argv[1] + str(n)}, b"") for n in range(40)]
make_chunks("tests.tasks.makers:Echo", {"mark": 1}, chunks, ChunkCache(Home.open(), "echo"), 2)
"""


def test_no_worker_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "started")]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    wait_for(lambda: number_in(tmp_path / "started0"))
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_two_threads_that_make_the_same_chunk_both_get_it_whole(cache: ChunkCache) -> None:
    given = [chunk(number, times=20_000) for number in range(FEW_CHUNKS)]
    found: list[list[Made]] = []
    threads = [threading.Thread(target=lambda: found.append(make(given, cache))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for made, one in zip(found[0], given, strict=True):
        assert made.path.read_bytes() == one.payload * 20_000 + b"m"
        assert made.sha256 == hashlib.sha256(made.path.read_bytes()).hexdigest()


def test_a_worker_killed_while_it_has_nothing_to_do_is_replaced(cache: ChunkCache) -> None:
    made = make([chunk(number) for number in range(8)], cache)
    for pid in {one.report["pid"] for one in made}:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    again = make([chunk(number) for number in range(8, 16)], cache)
    assert [one.reused for one in again] == [False] * 8
