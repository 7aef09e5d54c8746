"""Worker processes for data steps, and the one loop that makes chunks with them.

One decision: workers are plain programs (`python -m tasks.chunk_worker`) that live as long as the process that
started them and serve all its data steps. A handful of chunks is made in this process as long as there are none:
starting them takes longer.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from tasks.chunks import Chunk, ChunkCache, Made, Maker, make_chunk
from tasks.dask_chunks import make_on_dask
from tasks.fingerprint import fingerprint
from tasks.launch import ProgramFailed, python_path
from tasks.locks import check_stop

FEW_CHUNKS = 3  # no reason to start workers: a worker takes about 0.4 s to start, a chunk 0.1 s to make
POLL_SECONDS = 0.2
GRACE_SECONDS = 0.7  # for chunks to be finished after a stop


class _Worker:
    """One worker process."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        environment = os.environ | {"PYTHONPATH": python_path(), "RAYON_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tasks.chunk_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            start_new_session=True,  # Ctrl-C is the run's to handle
        )
        self.loaded: set[str] = set()

    def ask(self, name: str, run: str, settings: dict[str, Any], chunk: Chunk, target: Path) -> dict[str, Any]:
        """The worker's answer about one chunk.

        Raises:
            ProgramFailed: the worker is gone.
        """
        request = {"name": name, "task": chunk.task, "target": str(target), "payload": len(chunk.payload)}
        if name not in self.loaded:
            request |= {"run": run, "settings": settings}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n" + chunk.payload)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            code = self.process.wait()
            self.log.seek(0)
            tail = self.log.read().decode(errors="replace")[-2000:]
            raise ProgramFailed("killed", f"a data worker ended with exit code {code}; its last lines:\n{tail}")
        self.loaded.add(name)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it: it stops when its input ends."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone already, which is what was wanted
            self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Workers:
    """The workers of this process, started when they are first needed."""

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._count = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    def running(self) -> bool:
        """Whether there are any; they have been asked before, and have tokenizers and templates loaded."""
        return self._count > 0

    def start(self, count: int) -> None:
        """Have at least so many workers; returns before they are ready."""
        with self._lock:
            for _ in range(count - self._count):
                self._idle.put(_Worker())
                self._count += 1

    def make(
        self, name: str, run: str, settings: dict[str, Any], chunk: Chunk, target: Path, busy: set[_Worker]
    ) -> dict[str, Any]:
        """Make one chunk in the next idle worker; blocks until one is free.

        Args:
            name, run, settings: of the maker.
            chunk, target: what to make, and where.
            busy: has the worker in it as long as it is at the chunk.

        Returns:
            As `tasks.chunks.make_chunk`.

        Raises:
            InputError, ProgramFailed: as its maker says.
        """
        worker = self._idle.get()
        try:
            if worker.process.poll() is not None:  # killed while it had nothing to do
                worker = _replaced(worker)
            busy.add(worker)
            answer = worker.ask(name, run, settings, chunk, target)
        except BaseException:
            busy.discard(worker)
            worker.process.kill()  # whatever state it is in, the next chunk gets a new one
            gone, worker = worker, _replaced(worker)
            for part in target.parent.glob(f"{target.name}.{gone.process.pid}.*.part"):
                part.unlink()
            raise
        finally:
            busy.discard(worker)
            self._idle.put(worker)
        if "problems" in answer:
            raise InputError([Problem(*problem) for problem in answer["problems"]], answer["title"])
        if "message" in answer:
            raise ProgramFailed(answer["kind"], answer["message"])
        result: dict[str, Any] = answer["result"]
        return result

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            while self._count:
                self._idle.get().close()
                self._count -= 1


def _replaced(worker: _Worker) -> _Worker:
    worker.close()
    return _Worker()


WORKERS = Workers()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_chunks(
    run: str,
    settings: dict[str, Any],
    chunks: Iterable[Chunk],
    cache: ChunkCache,
    workers: int | None = None,
    on_made: Callable[[Made], None] = lambda made: None,
    stop: threading.Event | None = None,
    dask: str | None = None,
) -> list[Made]:
    """Every chunk, made or found, in order.

    Args:
        run: `module:class` of the maker.
        settings: of the maker, the same for all chunks; plain JSON types.
        chunks: read no further ahead than two per worker, so that their payloads stay bounded.
        cache: where chunks are looked for and kept.
        workers: processes to use; all cores when None, none at all for 1.
        on_made: told about each chunk, in order.
        stop: ends the work between two chunks with `Interrupted`.
        dask: address of a Dask scheduler whose workers make them, where there are more than a handful.

    Raises:
        InputError, ProgramFailed: as the maker says; chunks finished by then are kept.
        Interrupted: `stop` was set.
    """
    count = workers or cores()
    found, missing = _looked_up(chunks, cache, stop), 0
    few = 0 if WORKERS.running() and dask is None else FEW_CHUNKS
    head: list[Chunk | Made] = []  # chunks to make have their payloads; of those that are there it is let go
    for each in found:
        head.append(each)
        missing += isinstance(each, Chunk)
        if missing > few:
            break
    everything = chain(head, found)
    if missing <= few or (count == 1 and dask is None):
        results = _here(run, settings, everything, cache)
    elif dask is not None:
        results = make_on_dask(dask, run, settings, everything, cache, stop)
    else:
        WORKERS.start(count)
        results = _in_workers(run, settings, everything, cache, count, stop)
    collected = []
    with closing(results):  # also when stopped: an exception would keep it going
        for made in results:
            check_stop(stop)
            on_made(made)
            collected.append(made)
    return collected


def _looked_up(chunks: Iterable[Chunk], cache: ChunkCache, stop: threading.Event | None) -> Iterator[Chunk | Made]:
    """Each chunk that is there as it was made, each other one as it is to be made."""
    for chunk in chunks:
        check_stop(stop)
        yield cache.find(chunk.key) or chunk


def _made(target: Path, described: dict[str, Any]) -> Made:
    return Made(target, described["size"], described["sha256"], described["report"], reused=False)


def _here(run: str, settings: dict[str, Any], everything: Iterable[Chunk | Made], cache: ChunkCache) -> Generator[Made]:
    maker: Maker | None = None
    for each in everything:
        if isinstance(each, Made):
            yield each
            continue
        maker = maker or Maker.load(run, settings)
        target = cache.target(each.key)
        yield _made(target, make_chunk(maker, each.task, each.loaded().payload, str(target)))


def _in_workers(
    run: str,
    settings: dict[str, Any],
    everything: Iterable[Chunk | Made],
    cache: ChunkCache,
    count: int,
    stop: threading.Event | None,
) -> Generator[Made]:
    name = fingerprint({"run": run, "settings": settings})
    busy = set[_Worker]()

    def make(chunk: Chunk) -> Made:
        target = cache.target(chunk.key)
        return _made(target, WORKERS.make(name, run, settings, chunk.loaded(), target, busy))

    rest, waiting = iter(everything), deque[Made | Future[Made]]()
    executor = ThreadPoolExecutor(count)
    try:
        while True:
            for each in islice(rest, 2 * count - len(waiting)):
                waiting.append(each if isinstance(each, Made) else executor.submit(make, each))
            if not waiting:
                return
            first = waiting.popleft()
            yield first if isinstance(first, Made) else _result(first, stop)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        if stop is not None and stop.is_set():
            _hurry(busy)
        executor.shutdown()


def _hurry(busy: set[_Worker]) -> None:
    """Give workers a moment, then end them: a chunk can take long, and whoever stops does not want to wait."""
    end = time.monotonic() + GRACE_SECONDS
    while busy and time.monotonic() < end:
        time.sleep(0.02)
    for worker in list(busy):
        worker.process.kill()


def _result(future: Future[Made], stop: threading.Event | None) -> Made:
    while True:
        check_stop(stop)
        try:
            return future.result(POLL_SECONDS)
        except TimeoutError:
            continue
