"""Locks that die with their holder.

One decision: `flock` on a file of the home. The kernel frees it when the process ends, however it ends; a lock
file whose content says "taken" hangs every later run after a SIGKILL. Not safe on some network file systems.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.2


class Interrupted(BaseException):
    """The run was asked to stop (SIGINT, SIGTERM, cancel). Not an `Exception`: no handler may swallow it."""


def check_stop(stop: threading.Event | None) -> None:
    """Raise `Interrupted` when the run was asked to stop."""
    if stop is not None and stop.is_set():
        raise Interrupted


@contextmanager
def locked(
    path: Path, stop: threading.Event | None = None, waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the lock of `path` for the body.

    Args:
        path: the lock file; its content names the last holder, for people.
        stop: ends the wait with `Interrupted`.
        waiting: called once with a sentence when someone else holds it.

    Raises:
        Interrupted: `stop` was set while waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        said = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting and not said:
                    waiting(f"waiting for process {_holder(path)}, which is at it")
                    said = True
                check_stop(stop)
                time.sleep(POLL_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return str(json.loads(path.read_text()).get("pid", "?"))
    except ValueError:
        return "?"


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock of `path` for the body if it is free; yields whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def is_free(path: Path) -> bool:
    """Whether nobody holds a lock now."""
    with try_lock(path) as free:
        return free
