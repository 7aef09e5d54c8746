"""Programs on this machine: plain Python, or torchrun.

One decision: a program gets its own session, and the whole tree is remembered while it lives: torchrun puts every rank
in a session of its own, which killing one process group misses, and an orphan has no parent to be found by.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tasks.launchers.job import PROJECT, Ended, Job, Say, command
from tasks.program import LAUNCHER_PID
from tasks.slots import seen_devices

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL; below the 30 s after which Prefect kills the flow itself


class Local:
    """Starts programs on this machine."""

    def launch(self, job: Job, say: Say) -> LocalProgram:
        """Start a program; it ends with this process."""
        job.write()
        kills = memory_kills()
        with open(job.log, "ab") as log:
            child = subprocess.Popen(
                command(job.module, job.spec_file, job.processes, job.nodes),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(job.processes) | seen_devices(job.spec.devices) | dict(job.environment),
                start_new_session=True,
            )
        return LocalProgram(child, job.module, job.log, kills)


def start_command(command: Sequence[str], log_path: Path) -> LocalProgram:
    """Start somebody else's program, which ends with this process.

    Args:
        command: program and arguments; no shell reads them.
        log_path: gets what it prints.
    """
    kills = memory_kills()
    with open(log_path, "ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tasks.guarded", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(1),
            start_new_session=True,
        )
    return LocalProgram(child, Path(command[0]).name, log_path, kills)


class LocalProgram:
    """A program and all processes that it started.

    Args:
        child: the process.
        name: of what it does, for people.
        log: what it prints goes there.
        kills: `memory_kills` before it began.
    """

    def __init__(self, child: subprocess.Popen[bytes], name: str, log: Path, kills: int) -> None:
        self.child, self.name, self.log, self.kills = child, name, log, kills
        self.seen: dict[int, psutil.Process] = {}
        self.looked = 0.0

    def wait(self, seconds: float) -> Ended | None:
        """How it ended; None while it is at it after so many seconds."""
        if self.child.poll() is None:
            self._look()
            time.sleep(seconds)
        if self.child.poll() is None:
            return None
        if self.child.returncode != 0 and memory_kills() > self.kills:
            words = f"the kernel ended {self.name} for want of memory"
            return Ended(self.child.returncode, "out_of_memory", words)
        return Ended(self.child.returncode)

    def logs(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _look(self) -> None:
        """Remember what is running now; at most every second."""
        if time.monotonic() - self.looked < 1.0:
            return
        self.looked = time.monotonic()
        try:
            self.seen |= {process.pid: process for process in psutil.Process(self.child.pid).children(recursive=True)}
        except psutil.NoSuchProcess:
            return

    def cancel(self) -> None:
        """TERM to the program, a grace period, then KILL to whatever of the tree is left."""
        self.looked = 0.0
        self._look()
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


def python_path() -> str:
    """The project first, so that `-m tasks.…` finds the packages whatever the working directory is."""
    return os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
