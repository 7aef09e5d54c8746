"""Launched programs, seen from the task: start, follow, end.

One decision: a program writes to files; the task polls. So a stop request, a deadline and a death are each noticed
within a fraction of a second, wherever the program is, and `finally` ends all of it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.launchers.job import (
    PROJECT,
    RETRIED,
    Ended,
    Job,
    Launcher,
    ProgramFailed,
    Running,
    command,
    tail,
)
from tasks.launchers.local import Local, python_path, start_command
from tasks.locks import check_stop
from tasks.nodes import Nodes
from tasks.program import Spec, disk_full, disk_is_full, ended_by

__all__ = ["PROJECT", "RETRIED", "ProgramFailed", "command", "python_path", "run_command", "run_program"]
POLL_SECONDS = 0.2
LOCAL = Local()


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
    launcher: Launcher = LOCAL,
) -> None:
    """Run a program to its end.

    Args:
        module: the module whose `main` reads the spec.
        spec: what to do.
        folder: where spec.json and program.log are written.
        on_event: gets every event the program emits, in order.
        stop: when set, the program is ended and `Interrupted` raised.
        processes: ranks on each machine.
        deadline: most seconds it may take.
        nodes: the machines it runs on; given, it is started by torchrun.
        environment: variables beside those of this process; what must not stand in a file is told this way.
        launcher: starts it.

    Raises:
        ProgramFailed: it failed, was killed, or took too long.
        Interrupted: `stop` was set.
    """
    job = Job(module, spec, folder, processes, nodes, environment or {})
    running = launcher.launch(job, lambda text: on_event({"kind": "note", "text": text}))
    started = time.monotonic()
    try:
        with open(spec.events, encoding="utf-8") as events:
            while (ended := running.wait(POLL_SECONDS)) is None:
                _forward(events, on_event)
                check_stop(stop)
                if deadline is not None and time.monotonic() - started > deadline:
                    raise ProgramFailed("deadline", f"{module} took more than {deadline:g} s and was ended")
            _forward(events, on_event)
    finally:
        running.cancel()
    if ended.code != 0:
        check_stop(stop)  # who ends the run may have sent its signal to the program as well
        failure = _failure(job, ended, running)
        if failure.kind == "killed" and ended.kind == "out_of_memory":
            raise ProgramFailed(ended.kind, ended.words)
        raise failure


def run_command(command: Sequence[str], log_path: Path) -> None:
    """Run somebody else's program to its end, its output in a file.

    Args:
        command: program and arguments; no shell reads them.
        log_path: gets what it prints.

    Raises:
        ProgramFailed: it failed or was killed, with its last lines.
    """
    program = start_command(command, log_path)
    try:
        while (ended := program.wait(POLL_SECONDS)) is None:
            continue
    finally:
        program.cancel()
    if ended.code != 0:
        raise _ended(program.name, ended, tail(program.logs()))


def last_lines(log_path: Path) -> str:
    """The end of a log, for people."""
    return tail(log_path.read_text(encoding="utf-8", errors="replace"))


def _forward(events: Any, on_event: Callable[[dict[str, Any]], None]) -> None:
    while True:
        position = events.tell()
        line = events.readline()
        if not line.endswith("\n"):  # nothing new, or half a line: read it again when it is whole
            events.seek(position)
            return
        on_event(json.loads(line))


def _failure(job: Job, ended: Ended, running: Running) -> ProgramFailed:
    """What went wrong, in the program's own words where it has some."""
    causes = [cause for path in job.failures() if (cause := _cause(path)) is not None]
    # a machine that loses the others says so; what made them leave says more
    for kind, message in sorted(causes, key=lambda cause: cause[0] == "unexpected")[:1]:
        return ProgramFailed(kind, message)
    return _ended(job.module, ended, tail(running.logs()), f" ({job.log})")


def _ended(program: str, ended: Ended, lines: str, where: str = "") -> ProgramFailed:
    """What a program died of, by how it ended and its last lines; `where` says which file has the others."""
    code = ended.code
    if disk_is_full():
        return ProgramFailed("disk_full", disk_full(f"{program} ended with exit code {code}"))
    if code < 0:
        return ProgramFailed("killed", f"{program} {ended.words or ended_by(-code)}; its last lines:\n{lines}")
    kind = "lost_port" if "EADDRINUSE" in lines or "address already in use" in lines.lower() else "unexpected"
    return ProgramFailed(kind, f"{program} ended with exit code {code}; its last lines{where}:\n{lines}")


def _cause(path: Path) -> tuple[str, str] | None:
    """What a program wrote about its failure; None where it is not whole: a full disk takes half of it."""
    try:
        cause = json.loads(path.read_text(encoding="utf-8"))
        return cause["kind"], cause["message"]
    except (FileNotFoundError, ValueError):
        return None
