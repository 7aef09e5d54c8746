"""Chunks made by the workers of a Dask cluster.

One decision: a worker writes its chunk into the home that all of them see, as a process of this machine would; what
comes back is the chunk's description. Its key says with what it was made, so every worker shows with each chunk that it
has the same code and packages: also one that joins later.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from tasks.chunk_worker import answer
from tasks.chunks import Chunk, ChunkCache, Made, Maker
from tasks.fingerprint import fingerprint
from tasks.launch import ProgramFailed
from tasks.locks import check_stop
from tasks.manifests import RECORDED
from tasks.versions import PROJECT, package_versions

SETTING = "preprocessing_dask"
CONNECT_SECONDS, POLL_SECONDS = 10, 0.2
SEEN_SECONDS = 75.0  # after which a file of another machine is there; NFS remembers for up to a minute what is not
AHEAD = 2  # chunks asked for by each thread of the workers

Answer = dict[str, Any]
_OWN = threading.local()  # of a worker's thread: its makers


def make_on_dask(
    address: str,
    run: str,
    settings: dict[str, Any],
    everything: Iterable[Chunk | Made],
    cache: ChunkCache,
    stop: threading.Event | None,
) -> Generator[Made]:
    """Every chunk, made or found, in order; see `tasks.workers.make_chunks`.

    Args:
        address: of the scheduler.

    Raises:
        InputError: as the maker says; a worker has other code or packages, or does not see this home.
        ProgramFailed: the scheduler does not answer, or workers died over a chunk again and again.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except OSError as error:
        rule = f"{SETTING}: no Dask scheduler answers at {address} ({error})"
        raise ProgramFailed("network", f"{rule}. Start it, or remove {SETTING}.") from error
    name, rest, waiting = fingerprint({"run": run, "settings": settings}), iter(everything), deque[Any]()
    shared = client.scatter({"name": name, "run": run, "settings": settings, "made_with": made_with()}, hash=False)
    try:
        while True:
            threads = sum(client.nthreads().values()) or 1
            for each in islice(rest, AHEAD * threads - len(waiting)):
                waiting.append(each if isinstance(each, Made) else _asked(client, shared, each, cache))
            if not waiting:
                return
            first = waiting.popleft()
            if isinstance(first, Made):
                yield first
            else:
                future, target = first
                yield _made(future, target, stop)
    finally:
        client.cancel([each[0] for each in waiting if not isinstance(each, Made)])
        client.close()


def _asked(client: Any, shared: Any, chunk: Chunk, cache: ChunkCache) -> tuple[Any, Path]:
    target = cache.target(chunk.key)
    loaded = chunk.loaded()
    # by its place: two homes may use one cluster
    future = client.submit(make_there, shared, loaded.task, loaded.payload, str(target), key=f"chunk-{target}")
    return future, target


def _made(future: Any, target: Path, stop: threading.Event | None) -> Made:
    """A chunk that was asked for, when it is there."""
    while not future.done():
        check_stop(stop)
        time.sleep(POLL_SECONDS)
    try:
        found: Answer = future.result()
    except Exception as error:  # what a maker says is an answer: this is a worker that died, or cannot import us
        raise ProgramFailed("killed", f"{SETTING}: {type(error).__name__}: {error}") from error
    if "problems" in found:
        raise InputError([Problem(*problem) for problem in found["problems"]], found["title"])
    if "message" in found:
        raise ProgramFailed(found["kind"], found["message"])
    described = found["result"]
    _require_seen(target, described["size"])
    return Made(target, described["size"], described["sha256"], described["report"], reused=False)


def _require_seen(target: Path, size: int) -> None:
    """Wait until a file that another machine has written is here."""
    end = time.monotonic() + SEEN_SECONDS
    while not (target.name in os.listdir(target.parent) and target.stat().st_size == size):
        if time.monotonic() > end:
            raise InputError(_other_home(str(target)), SETTING)
        time.sleep(POLL_SECONDS)


def make_there(shared: Answer, task: dict[str, Any], payload: bytes, target: str) -> Answer:
    """On a worker: make one chunk, as `tasks.chunk_worker.answer`."""
    rule = difference(made_with(), shared["made_with"])
    if rule:
        cure = "Install the same on every worker, and start them again."
        return {"title": SETTING, "problems": [["a Dask worker", rule, cure]]}
    if not Path(target).parent.is_dir():
        problem = _other_home(target)
        return {"title": SETTING, "problems": [[problem.where, problem.rule, problem.cure]]}
    makers: dict[str, Maker] = _OWN.__dict__.setdefault("makers", {})
    request = {"name": shared["name"], "task": task, "target": target}
    if shared["name"] not in makers:
        request |= {"run": shared["run"], "settings": shared["settings"]}
    return answer(request, payload, makers)


def _other_home(target: str) -> Problem:
    cure = "Have LLAMATUNER_HOME and the data on a disk that all machines see at the same place."
    return Problem("a Dask worker", f"does not see {Path(target).parent} of this machine's home", cure)


@cache
def made_with() -> dict[str, str]:
    """What decides what a chunk is made of, beside what it is told: Python, packages, the project's own code."""
    digest = hashlib.sha256()
    for folder in ("registry", "tasks"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(PROJECT)}\0".encode() + path.read_bytes() + b"\0")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python, "LLamaTuner's code": digest.hexdigest()[:12], **package_versions(RECORDED)}


def difference(there: dict[str, str], here: dict[str, str]) -> str | None:
    """What a worker has that is not as here, for people.

    >>> difference({"python": "3.11", "pyarrow": "21"}, {"python": "3.11", "pyarrow": "22"})
    'has pyarrow 21, this machine 22'
    """
    found = [f"{name} {there.get(name)}, this machine {here[name]}" for name in here if there.get(name) != here[name]]
    return f"has {'; '.join(found)}" if found else None
