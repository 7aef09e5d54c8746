"""Runs that are watched, ended, and looked at afterwards."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tasks.locks import try_lock


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and everything it started that is still alive."""
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all, the first one first."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def require_gone(processes: list[psutil.Process], seconds: float = 15.0) -> None:
    """Wait until all have ended.

    Raises:
        AssertionError: some are alive after that time.
    """
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    left = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not left, left


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240.0) -> None:
    """Wait for a moment in a run.

    Raises:
        AssertionError: the run ended, or the time passed, before it.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.05)


def checkpoint(home: Path) -> int:
    """Step of the newest whole checkpoint; 0 without one."""
    whole = home.glob("work/train-*/scratch/checkpoints/checkpoint-*/whole.json")
    return max((int(path.parent.name.split("-")[1]) for path in whole), default=0)


def adapter(home: Path) -> bytes:
    """The weights of the one adapter in a home."""
    (path,) = home.glob("artifacts/train/*/adapter_model.safetensors")
    return path.read_bytes()


def copy_home(source: Path, target: Path, *without: str) -> None:
    """Copy a home, but for some of its folders."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for name in without:
        shutil.rmtree(target / name)


def mlflow_states(home: Path) -> list[str]:
    """States of all runs, oldest first."""
    return _column(home / "mlflow" / "mlflow.db", "SELECT status FROM runs ORDER BY start_time")


def prefect_database(home: Path) -> Path:
    """Where a home keeps what its own Prefect servers know."""
    return home / "prefect" / "prefect.db"


def prefect_states(database: Path) -> list[str]:
    """States of all flow runs, oldest first."""
    return _column(database, "SELECT state_type FROM flow_run ORDER BY created")


def prefect_pages(database: Path) -> list[str]:
    """Keys of everything that runs left for Prefect's pages."""
    return _column(database, "SELECT key FROM artifact WHERE key IS NOT NULL")


def record_states(home: Path) -> list[str]:
    """States of all run records, oldest first."""
    paths = sorted((home / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    records = [json.loads(path.read_text()) for path in paths]
    return [record["status"] for record in sorted(records, key=lambda record: str(record["id"]))]


def _column(database: Path, query: str) -> list[str]:
    connection = sqlite3.connect(database, timeout=30)
    try:
        return [str(value) for (value,) in connection.execute(query)]
    finally:
        connection.close()


def require_nothing_open(home: Path, database: Path | None = None) -> None:
    """No run is called running anywhere, no work is left, no lock is held.

    Args:
        home: of the runs.
        database: of the Prefect server that was told of them; the home's own when not given.

    Raises:
        AssertionError: something is.
    """
    database = database or prefect_database(home)
    assert "RUNNING" not in mlflow_states(home), f"in MLflow: {mlflow_states(home)}"
    assert "RUNNING" not in prefect_states(database), f"in Prefect: {prefect_states(database)}"
    running = "SELECT flow_run_id || ' ' || name FROM task_run WHERE state_type = 'RUNNING' OR state_name = 'Pending'"
    left = _column(database, running)
    assert left == [], f"tasks in Prefect: {left}"
    assert "running" not in record_states(home), f"records: {record_states(home)}"
    work = [path.name for path in (home / "work").iterdir()]
    assert work == [], f"work: {work}"
    for path in (home / "locks").rglob("*"):
        if path.is_file():
            with try_lock(path) as free:
                assert free, path
