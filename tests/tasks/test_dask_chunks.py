"""Chunks made by a Dask cluster on loopback: the same ones, in order, whatever dies; and clusters that are refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from registry.errors import InputError
from registry.home import Home
from tasks import dask_chunks
from tasks.chunks import ChunkCache, Made
from tasks.dask_chunks import difference, made_with
from tasks.launch import ProgramFailed
from tasks.locks import Interrupted
from tasks.workers import FEW_CHUNKS, make_chunks
from tests.tasks.test_workers import ECHO, AtTheFirst, chunk, number_in, wait_for

pytestmark = pytest.mark.slow
HERE = {"host": "127.0.0.1", "dashboard_address": None}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **HERE) as made:
        yield made


@pytest.fixture
def cache() -> ChunkCache:
    return ChunkCache(Home.open(), "echo")


def make(cluster: LocalCluster, chunks: Any, cache: ChunkCache, **more: Any) -> list[Made]:
    return make_chunks(ECHO, {"mark": "m"}, chunks, cache, dask=cluster.scheduler_address, **more)


def test_chunks_come_in_order_and_are_those_that_this_machine_makes(cluster: LocalCluster, cache: ChunkCache) -> None:
    given = [chunk(number, seconds=0.1 if number == 0 else 0) for number in range(12)]
    told: list[Path] = []
    made = make(cluster, given, cache, on_made=lambda one: told.append(one.path))
    assert [one.path.read_bytes() for one in made] == [each.payload + b"m" for each in given]
    assert [one.sha256 for one in made] == [hashlib.sha256(each.payload + b"m").hexdigest() for each in given]
    assert told == [one.path for one in made]
    assert len({one.report["pid"] for one in made} - {os.getpid()}) == 2
    again = make(cluster, [*given, chunk(12), chunk(13)], cache)
    assert [one.reused for one in again] == [True] * 12 + [False] * 2
    assert {one.report["pid"] for one in again[12:]} == {os.getpid()}, f"{FEW_CHUNKS} chunks are not worth asking"


def test_what_a_maker_refuses_arrives_whole_and_what_was_made_before_is_kept(
    cluster: LocalCluster, cache: ChunkCache
) -> None:
    given = [chunk(number, **({"refuse": "é"} if number == 9 else {})) for number in range(10)]
    with pytest.raises(InputError) as raised:
        make(cluster, given, cache)
    assert (raised.value.title, [problem.where for problem in raised.value.problems]) == (
        "data",
        ["a.jsonl, line 3", "b"],
    )
    assert all(cache.find(each.key) for each in given[:-1])
    with pytest.raises(ProgramFailed, match="seven"):
        make(cluster, [chunk(number, fail="seven") for number in range(20, 28)], cache)


def test_a_worker_that_dies_costs_its_chunk_which_another_makes(
    cluster: LocalCluster, cache: ChunkCache, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    given = [chunk(0, seconds=2, started=str(started)), *(chunk(number) for number in range(1, 8))]
    killer = threading.Thread(target=lambda: os.kill(wait_for(lambda: number_in(started)), signal.SIGKILL))
    killer.start()
    made = make(cluster, given, cache)
    killer.join()
    assert [one.path.read_bytes() for one in made] == [each.payload + b"m" for each in given]


def test_a_stop_ends_the_work_within_two_seconds(cluster: LocalCluster, cache: ChunkCache) -> None:
    stopper = AtTheFirst()
    given = [chunk(number, seconds=0.2) for number in range(60)]
    with pytest.raises(Interrupted):
        make(cluster, given, cache, on_made=stopper, stop=stopper.stop)
    assert stopper.seconds() < 2.0
    time.sleep(1.0)
    with Client(cluster.scheduler_address, set_as_default=False) as client:
        assert not any(client.processing().values()), "what was asked for and not begun is taken back"


def test_other_code_or_packages_are_refused_by_name(
    cluster: LocalCluster, cache: ChunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = made_with() | {"pyarrow": "1.0"}
    monkeypatch.setattr(dask_chunks, "made_with", lambda: other)
    with pytest.raises(InputError, match=r"has pyarrow \S+, this machine 1\.0.*Install the same on every worker"):
        make(cluster, [chunk(number) for number in range(100, 110)], cache)
    assert difference(made_with(), made_with()) is None


def test_a_cluster_that_does_not_see_the_home_is_refused(
    cluster: LocalCluster, cache: ChunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_chunks, "SEEN_SECONDS", 0.5)
    given = [chunk(number) for number in range(200, 210)]
    real = cache.target

    def gone(key: str) -> Path:
        """As on a worker that has no such folder."""
        target = real(key)
        shutil.rmtree(target.parent)
        return target

    monkeypatch.setattr(cache, "target", gone)
    with pytest.raises(InputError, match=r"does not see .* of this machine's home"):
        make(cluster, given, cache)


def test_no_scheduler_is_said_with_its_address(cache: ChunkCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_chunks, "CONNECT_SECONDS", 1)
    with pytest.raises(ProgramFailed, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .*Start it") as raised:
        make_chunks(ECHO, {"mark": "m"}, [chunk(n) for n in range(9)], cache, dask="tcp://127.0.0.1:9")
    assert raised.value.kind == "network"
