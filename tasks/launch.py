"""Launched programs, seen from the task: start, follow, end.

One decision: a program gets its own session and writes to files; the task polls. So a stop request, a deadline and
a death are each noticed within a fraction of a second, and `finally` ends the whole tree: torchrun puts every rank in
a session of its own, which killing one process group misses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tasks.locks import check_stop
from tasks.nodes import Nodes
from tasks.program import LAUNCHER_PID, Spec, disk_full, disk_is_full, ended_by
from tasks.slots import seen_devices

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL; below the 30 s after which Prefect kills the flow itself
SHOWN_LINES = 15  # of a log, where a program failed
RETRIED = frozenset({"killed", "lost_port", "network"})
PROJECT = Path(__file__).resolve().parent.parent


class ProgramFailed(Exception):
    """A launched program ended without success.

    Args:
        kind: what `tasks.program.classify` found, `killed` (by a signal) or `deadline`; decides about a retry.
        message: what to tell the person.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def retried(self) -> bool:
        """Whether doing the same again can help."""
        return self.kind in RETRIED


def command(module: str, spec: Path, processes: int = 1, nodes: Nodes | None = None) -> list[str]:
    """The command line of a program: plain Python, or torchrun when it has several processes or `nodes` are given."""
    if processes == 1 and nodes is None:
        return [sys.executable, "-m", module, str(spec)]
    return [sys.executable, "-m", "tasks.ranks", *(nodes or Nodes()).torchrun(processes), "-m", module, str(spec)]


def run_program(
    module: str,
    spec: Spec,
    folder: Path,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event | None = None,
    processes: int = 1,
    deadline: float | None = None,
    nodes: Nodes | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program to its end.

    Args:
        module: the module whose `main` reads the spec.
        spec: what to do.
        folder: where spec.json and program.log are written.
        on_event: gets every event the program emits, in order.
        stop: when set, the program is ended and `Interrupted` raised.
        processes: ranks on this machine.
        deadline: most seconds it may take.
        nodes: the machines it runs on; given, it is started by torchrun.
        environment: variables beside those of this process; what must not stand in a file is told this way.

    Raises:
        ProgramFailed: it failed, was killed, or took too long.
        Interrupted: `stop` was set.
    """
    spec_path, log_path = folder / "spec.json", folder / "program.log"
    _write(spec, spec_path)
    kills = memory_kills()
    with open(log_path, "ab") as log, open(spec.events, encoding="utf-8") as events:
        child = subprocess.Popen(
            command(module, spec_path, processes, nodes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(processes) | seen_devices(spec.devices) | dict(environment or {}),
            start_new_session=True,
        )
        tree = _Tree(child)
        started = time.monotonic()
        try:
            while child.poll() is None:
                _forward(events, on_event)
                check_stop(stop)
                if deadline is not None and time.monotonic() - started > deadline:
                    raise ProgramFailed("deadline", f"{module} took more than {deadline:g} s and was ended")
                tree.look()
                time.sleep(POLL_SECONDS)
            _forward(events, on_event)
        finally:
            tree.end()
    if child.returncode != 0:
        check_stop(stop)  # who ends the run may have sent its signal to the program as well
        failure = _failure(module, spec, child.returncode, log_path)
        if failure.kind == "killed" and memory_kills() > kills:
            raise ProgramFailed("out_of_memory", f"the kernel ended {module} for want of memory")
        raise failure


def run_command(command: Sequence[str], log_path: Path) -> None:
    """Run somebody else's program to its end, its output in a file.

    Args:
        command: program and arguments; no shell reads them.
        log_path: gets what it prints.

    Raises:
        ProgramFailed: it failed or was killed, with its last lines.
    """
    with open(log_path, "ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tasks.guarded", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(1),
            start_new_session=True,
        )
        tree = _Tree(child)
        try:
            while child.poll() is None:
                tree.look()
                time.sleep(POLL_SECONDS)
        finally:
            tree.end()
    if child.returncode != 0:
        raise _ended(Path(command[0]).name, child.returncode, last_lines(log_path))


def _write(spec: Spec, path: Path) -> None:
    """Write a spec, and remove what an earlier attempt has left."""
    path.write_text(json.dumps(asdict(spec), indent=1), encoding="utf-8")
    for leftover in (spec.events, spec.failure):
        Path(leftover).unlink(missing_ok=True)
    Path(spec.events).touch()


def memory_kills() -> int:
    """Processes the kernel has ended for want of memory since it started; 0 where it does not say."""
    counters = Path("/proc/vmstat")
    lines = counters.read_text(encoding="ascii").splitlines() if counters.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _environment(processes: int) -> dict[str, str]:
    """The environment of a program whose ranks share the cores."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | os.environ
    return environment | {LAUNCHER_PID: str(os.getpid()), "PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path()}


class _Tree:
    """The processes of one program, remembered while they live: an orphan has no parent to be found by."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self.seen: dict[int, psutil.Process] = {}
        self.looked = 0.0

    def look(self) -> None:
        """Remember what is running now; at most every second."""
        if time.monotonic() - self.looked < 1.0:
            return
        self.looked = time.monotonic()
        try:
            self.seen |= {process.pid: process for process in psutil.Process(self.child.pid).children(recursive=True)}
        except psutil.NoSuchProcess:
            return

    def end(self) -> None:
        """TERM to the program, a grace period, then KILL to whatever of the tree is left."""
        self.looked = 0.0
        self.look()
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        left = [process for process in self.seen.values() if process.is_running()]
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=GRACE_SECONDS)


def python_path() -> str:
    """The project first, so that `-m tasks.…` finds the packages whatever the working directory is."""
    return os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))


def _forward(events: Any, on_event: Callable[[dict[str, Any]], None]) -> None:
    while True:
        position = events.tell()
        line = events.readline()
        if not line.endswith("\n"):  # nothing new, or half a line: read it again when it is whole
            events.seek(position)
            return
        on_event(json.loads(line))


def _failure(module: str, spec: Spec, code: int, log_path: Path) -> ProgramFailed:
    try:
        cause = json.loads(Path(spec.failure).read_text(encoding="utf-8"))
        return ProgramFailed(cause["kind"], cause["message"])
    except (FileNotFoundError, ValueError):  # not written, or not whole: a full disk takes half of it
        return _ended(module, code, last_lines(log_path), f" ({log_path})")


def last_lines(log_path: Path) -> str:
    """The end of a program's log."""
    return "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:])


def _ended(program: str, code: int, tail: str, where: str = "") -> ProgramFailed:
    """What a program died of, by its exit code and last lines; `where` says which file has the others."""
    if disk_is_full():
        return ProgramFailed("disk_full", disk_full(f"{program} ended with exit code {code}"))
    if code < 0:
        return ProgramFailed("killed", f"{program} {ended_by(-code)}; its last lines:\n{tail}")
    kind = "lost_port" if "EADDRINUSE" in tail or "address already in use" in tail.lower() else "unexpected"
    return ProgramFailed(kind, f"{program} ended with exit code {code}; its last lines{where}:\n{tail}")
