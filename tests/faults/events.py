"""What happens to a run: signals, a full disk, servers that die or hang, somebody who cancels, a machine that restarts.

One decision: an event returns at once and leaves the run to end as it does; only what the world would do anyway (a
disk that is freed, a hung server that goes on) is undone, by what it returns.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.services import ask
from registry.home import Home
from tasks.servers import MLFLOW, PREFECT, WORKER, read_servers
from tests.flows.processes import kill

HUNG_SECONDS = 60.0
START_SECONDS = 20.0
POLL_SECONDS = 0.002


def processes(home: Path) -> list[psutil.Process]:
    """Everything that works for a home; this process aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("LLAMATUNER_HOME") == str(home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


class Missed(Exception):
    """The run had ended, or passed the place, before the fault came."""


@dataclass(frozen=True)
class Scene:
    """A run that has come to its place."""

    home: Path
    command: subprocess.Popen[str]
    """What the person started: `run`, or `submit` that follows a worker's run."""
    flow: psutil.Process
    """The process in which the flow runs."""

    def programs(self) -> list[psutil.Process]:
        """What the flow started to do its steps; not the Prefect server that it brings along."""
        below = self.flow.children(recursive=True)
        servers = [each for each in below if "flows.prefect_server" in each.cmdline()]
        own = {each.pid for server in servers for each in (server, *server.children(recursive=True))}
        return [each for each in below if each.pid not in own]

    def at_work(self) -> list[psutil.Process]:
        """The same, when there are some: they start a moment after their step.

        Raises:
            Missed: the step was over before.
        """
        deadline = time.monotonic() + START_SECONDS
        own = self.flow.cmdline()  # of a child that is not what it was started as yet; stopped then, it holds the flow
        while not (found := [each for each in self.programs() if each.cmdline() not in ([], own)]):
            if time.monotonic() > deadline:
                raise Missed("nothing works for the step")
            time.sleep(POLL_SECONDS)
        return found


Undo = Callable[[], None]


def nothing() -> None:
    """What there is to undo of most events."""


def kill_flow(scene: Scene) -> Undo:
    """SIGKILL of the flow's process alone."""
    kill([scene.flow])
    return nothing


def kill_program(scene: Scene) -> Undo:
    """SIGKILL of what does the step."""
    kill(scene.at_work()[:1])
    return nothing


def kill_rank(scene: Scene) -> Undo:
    """SIGKILL of one rank of a training on several."""
    ranks = [each for each in scene.programs() if "RANK" in each.environ() and "tasks.train.program" in each.cmdline()]
    assert len(ranks) > 1, "the training has one rank"
    kill(ranks[-1:])
    return nothing


def terminate(scene: Scene) -> Undo:
    """SIGTERM, as a batch system or a container's end sends it."""
    scene.flow.send_signal(signal.SIGTERM)
    return nothing


def interrupt(scene: Scene) -> Undo:
    """Ctrl-C."""
    scene.flow.send_signal(signal.SIGINT)
    return nothing


def fill_disk(scene: Scene) -> Undo:
    """Not a byte left on the disk of the home."""
    ballast = scene.home / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=64k"], capture_output=True, check=False)
    return ballast.unlink


def restart_machine(scene: Scene) -> Undo:
    """Everything that works for the home is gone at once."""
    kill(processes(scene.home))
    return nothing


def hang(scene: Scene) -> Undo:
    """What does the step does nothing any more; the run's time is over some seconds later."""
    for process in scene.at_work():
        process.suspend()
    return nothing


def _kill_server(name: str) -> Callable[[Scene], Undo]:
    def event(scene: Scene) -> Undo:
        server = psutil.Process(read_servers(Home(scene.home))[name].pid)
        kill([server, *server.children(recursive=True)] if name != WORKER else [server])
        return nothing

    return event


def _hang_server(name: str) -> Callable[[Scene], Undo]:
    """A server answers nobody for a minute."""

    def event(scene: Scene) -> Undo:
        server = psutil.Process(read_servers(Home(scene.home))[name].pid)
        family = [server, *server.children(recursive=True)]
        for process in family:
            process.suspend()

        def go_on() -> None:
            for process in family:
                process.resume()

        timer = threading.Timer(HUNG_SECONDS, go_on)
        timer.start()
        return timer.join

    return event


def cancel(scene: Scene) -> Undo:
    """What the cancel button of Prefect's pages does."""
    api = read_servers(Home(scene.home))[PREFECT].url
    runs = ask(f"{api}/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}})
    for each in runs:
        ask(f"{api}/flow_runs/{each['id']}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    return nothing


ALONE: dict[str, tuple[Callable[[Scene], Undo], tuple[str, ...]]] = {
    "SIGKILL flow": (kill_flow, ("crashed",)),
    "SIGKILL program": (kill_program, ("completed",)),
    "SIGKILL rank": (kill_rank, ("completed",)),
    "SIGTERM": (terminate, ("cancelled",)),
    "Ctrl-C": (interrupt, ("cancelled",)),
    "timeout": (hang, ("failed",)),
    "disk full": (fill_disk, ("failed", "crashed")),  # where not even the record's end could be written
    "restart": (restart_machine, ("crashed",)),
}
"""Events of a run without servers, each with the states that its record may have afterwards."""
SERVED: dict[str, tuple[Callable[[Scene], Undo], tuple[str, ...]]] = {
    "SIGKILL worker": (_kill_server(WORKER), ("completed", "crashed", "cancelled")),
    "SIGKILL Prefect": (_kill_server(PREFECT), ("completed", "crashed", "failed")),
    "SIGKILL MLflow": (_kill_server(MLFLOW), ("completed",)),
    "Prefect hangs": (_hang_server(PREFECT), ("completed",)),
    "MLflow hangs": (_hang_server(MLFLOW), ("completed",)),
    "cancel": (cancel, ("cancelled",)),
    "restart all": (restart_machine, ("crashed",)),
}
"""Events of a worker's run, reported to servers."""
