"""What is wrong with a home, and what of it can be put right without asking anybody.

One decision: the checks mend what a next run would mend anyway (runs that died, reports that wait) and what can do
harm only (programs nobody waits for). Whatever needs a decision is said with its command.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from flows.launching import jobs_without_run
from flows.reconcile import reconcile
from flows.run_records import RunRecord, records, unclosed
from flows.servers import live_runs
from flows.services import SERVICES
from registry.home import Home
from tasks.artifacts import Store, damage
from tasks.launchers.job import LEFT
from tasks.locks import is_free
from tasks.mlflow_journal import left_behind
from tasks.servers import PREFECT, read_servers
from tasks.tracking import tell_what_waits

SPEC = "spec.json"
LOW_DISK = 5 << 30  # bytes; one checkpoint of a model of a billion weights is about that
GRACE_SECONDS = 10.0

State = Literal["good", "mended", "bad"]


@dataclass(frozen=True)
class Finding:
    """What one check came to."""

    check: str
    state: State
    text: str
    """What was found, and the command that helps where somebody has to do something."""


def examine(home: Home, say: Callable[[str], None]) -> Iterator[Finding]:
    """Check a home, and mend what can be.

    Args:
        home: which.
        say: told what is done meanwhile.
    """
    yield _orphans(home)
    yield _mlflow(home, say)
    yield _dead_runs(home, say)  # what they have for MLflow has been told by now
    yield _servers(home)
    yield _unfinished(home)
    yield _damaged(home)
    yield _disk(home)


def _orphans(home: Home) -> Finding:
    """Programs of steps whose flow is gone: Linux ends them with it, other systems do not."""
    found = [process for process in psutil.process_iter() if _is_orphan(process, home)]
    for process in found:
        process.terminate()
    _, alive = psutil.wait_procs(found, timeout=GRACE_SECONDS)
    for process in alive:
        process.kill()
    if found:
        return Finding("programs", "mended", f"ended {len(found)} whose flow is gone: {_pids(found)}")
    jobs = jobs_without_run(home)
    if jobs:
        text = f"{'; '.join(jobs)}: the next run of their recipe takes them over, `artifacts gc` ends them"
        return Finding("programs", "good", text)
    return Finding("programs", "good", "none works for a flow that is gone")


def _is_orphan(process: psutil.Process, home: Home) -> bool:
    try:
        spec = Path((process.cmdline() or [""])[-1])
        ended = process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:  # another user's, or just ended
        return False
    if ended or spec.name != SPEC or spec.parent.parent != home.work:
        return False
    # the flow holds the lock of a step's key as long as it lives; process ids tell less, in a container above all
    locks = list(home.locks.glob(f"{spec.parent.name.rpartition('-')[2]}*.lock"))
    return all(is_free(lock) for lock in locks) and not (spec.parent / LEFT).exists()  # a cluster's job may go on


def _pids(found: list[psutil.Process]) -> str:
    return ", ".join(f"process {process.pid}" for process in found)


def _dead_runs(home: Home, say: Callable[[str], None]) -> Finding:
    from flows.prefect_server import prefect_api

    dead = _dead(home)
    if not dead:
        return Finding("runs", "good", f"none died without a word; {len(live_runs(home))} going on")
    try:
        with prefect_api(home):
            reconcile(home, say)
    except Exception as error:  # noqa: BLE001 - what is in the way is said, and the other checks go on
        say(f"Prefect cannot be told: {type(error).__name__}: {error}")
    left, names = _dead(home), ", ".join(record.values["id"] for record in dead)
    if left:
        return Finding("runs", "bad", f"not closed in Prefect and MLflow, and cannot be yet: {names}")
    return Finding("runs", "mended", f"died, or could not be closed; closed now in Prefect and MLflow: {names}")


def _dead(home: Home) -> list[RunRecord]:
    return [record for record in records(home) if unclosed(record)]


def _mlflow(home: Home, say: Callable[[str], None]) -> Finding:
    count = sum(1 for _ in left_behind(home))
    if not count:
        return Finding("MLflow", "good", "has been told everything")
    if tell_what_waits(home, say):
        return Finding("MLflow", "mended", f"has been told what {count} earlier runs could not tell it")
    return Finding("MLflow", "bad", f"cannot be told what {count} earlier runs have for it; `llamatuner up` starts it")


def _servers(home: Home) -> Finding:
    servers = read_servers(home)
    if not servers:
        return Finding("servers", "good", "none is meant to run")
    dead = [name for name, server in servers.items() if not server.alive()]
    if dead:
        return Finding("servers", "bad", f"{', '.join(dead)} died; `llamatuner up` starts what does not run")
    api = servers[PREFECT].url if PREFECT in servers else None
    silent = [name for name, server in servers.items() if not SERVICES[name].healthy(server, api)]
    if silent:
        return Finding("servers", "bad", f"no answer from {', '.join(silent)}; see `llamatuner logs {silent[0]}`")
    return Finding("servers", "good", f"{', '.join(servers)} answer")


def _unfinished(home: Home) -> Finding:
    folders = [path.name for path in home.work.iterdir()] if home.work.is_dir() else []
    if not folders:
        return Finding("work", "good", "nothing is left half done")
    text = f"{len(folders)} steps are begun; the next run of their recipe goes on there, `artifacts gc` removes them"
    return Finding("work", "good", text)


def _damaged(home: Home) -> Finding:
    """Quick: sizes only; `artifacts verify` reads every byte."""
    bad = [f"{artifact.step}/{artifact.path.name}" for artifact in Store(home).all() if damage(artifact)]
    if bad:
        return Finding(
            "artifacts", "bad", f"files are missing or cut in {', '.join(bad)}; the next run makes them anew"
        )
    return Finding("artifacts", "good", "every file has its size; `llamatuner artifacts verify` reads them all")


def _disk(home: Home) -> Finding:
    free = shutil.disk_usage(home.path).free
    text = f"{free / (1 << 30):.1f} GiB free"
    if free < LOW_DISK:
        return Finding("disk", "bad", f"{text}; `llamatuner artifacts gc --dry-run` shows what could go")
    return Finding("disk", "good", text)
