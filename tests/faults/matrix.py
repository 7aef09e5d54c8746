"""One fault after the other: a run comes to a place, something happens, all is looked at, the next run goes on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flows.reconcile import HEARD_SECONDS
from tests.faults.events import ALONE, POLL_SECONDS, SERVED, Missed, Scene, fill_disk, hang, processes
from tests.faults.ground import PLACES, Ground, Place, digests, lacking
from tests.flows.processes import copy_home, kill, record_states, require_nothing_open
from tests.flows.toy import LONGEST, run, start

ATTEMPTS = 3  # to meet a place that is over within milliseconds
ORPHAN_SECONDS = 20.0
DISK = "300m"
TIMEOUT_MINUTES = 1


@dataclass
class Cell:
    """What came of one fault."""

    place: str
    event: str
    ended: str = "?"
    """State of the run's record in the end."""
    next_run: str = "?"
    """How the run behind it ended, and how many of its steps were there already."""
    faults: list[str] = field(default_factory=list)
    """Everything that is not as it must be."""

    def line(self) -> str:
        """For a table of 80 columns."""
        verdict = "good" if not self.faults else "; ".join(self.faults)
        return f"{self.place:<9} {self.event:<16} {self.ended:<10} {self.next_run:<22} {verdict}"


HEAD = f"{'place':<9} {'event':<16} {'run':<10} {'next run (kept)':<22} no orphan, none open, same bytes"


def cells(events: dict[str, object]) -> list[tuple[str, str]]:
    """(place, event) of all that can happen."""
    in_programs, of_ranks = ("SIGKILL program", "timeout"), ("SIGKILL rank",)
    return [
        (place.name, event)
        for place in PLACES.values()
        for event in events
        if (place.has_programs or event not in in_programs) and (place.name == "train" or event not in of_ranks)
    ]


def _wait(place: Place, home: Path, command: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LONGEST
    while not place.reached(home):
        if command.poll() is not None or time.monotonic() > deadline:
            raise Missed(f"the run never came to {place.name}")
        time.sleep(POLL_SECONDS)


@dataclass
class Met:
    """A run to which the fault has come."""

    command: subprocess.Popen[str]
    scene: Scene
    programs: list[psutil.Process]
    """What the flow had started by then."""
    undo: Callable[[], None]


def _meet(
    ground: Ground,
    place: Place,
    home: Path,
    word: str,
    event: Callable[[Scene], Callable[[], None]],
    flow: Callable[[subprocess.Popen[str]], int],
    *options: str,
) -> Met | None:
    """Start a run with the command `word`, and let the event happen at the place; None if none of some runs met it.

    Args:
        flow: the process of the run that the command began.
        options: of the command.
    """
    for _ in range(ATTEMPTS):
        lacking(home, place)
        command = start(word, str(ground.recipe), "--json", *options, LLAMATUNER_HOME=str(home))
        try:
            _wait(place, home, command)
            scene = Scene(home, command, psutil.Process(flow(command)))
            programs = scene.programs()
            return Met(command, scene, programs, event(scene))
        except (Missed, psutil.NoSuchProcess):
            command.communicate(timeout=LONGEST)
    return None


def alone(ground: Ground, place_name: str, event_name: str, home: Path) -> Cell:
    """A fault of a run that has no servers.

    Args:
        ground: the undisturbed run; its home is copied.
        place_name, event_name: see `PLACES` and `ALONE`.
        home: new; it is left for a look.
    """
    place, (event, allowed), cell = PLACES[place_name], ALONE[event_name], Cell(place_name, event_name)
    with _disk(home) if event is fill_disk else _folder(home):
        copy_home(ground.home, home)
        before = len(record_states(home))
        limit = ("--set", f"timeout_minutes={TIMEOUT_MINUTES}") if event is hang else ()
        met = _meet(ground, place, home, "run", event, lambda command: command.pid, *limit)
        if met is None:
            cell.faults.append("never met")
            return cell
        _out(met.command, cell)
        _no_orphans(lambda: processes(home), cell)
        met.undo()
        _go_on(ground, home, cell, before, _allowed(place, allowed))
    return cell


def served(ground: Ground, place_name: str, event_name: str, home: Path) -> Cell:
    """A fault of a run that a worker does.

    Args:
        ground: the undisturbed run.
        place_name, event_name: see `PLACES` and `SERVED`.
        home: whose servers are up; they are started again where the fault ended them.
    """
    place, (event, allowed), cell = PLACES[place_name], SERVED[event_name], Cell(place_name, event_name)
    before = len(record_states(home))
    met = _meet(ground, place, home, "submit", event, lambda _: _running(home))
    if met is None:
        cell.faults.append("never met")
        return cell
    try:
        met.scene.flow.wait(LONGEST)
    except psutil.TimeoutExpired:
        cell.faults.append("the flow never ended")
        kill([met.scene.flow])
    _no_orphans(lambda: [each for each in met.programs if each.is_running()], cell)
    met.undo()
    if met.command.poll() is None and "Prefect" in event_name:
        kill([psutil.Process(met.command.pid)])  # it follows a server that is gone
    _out(met.command, cell)
    run("up", LLAMATUNER_HOME=str(home))
    if event_name == "SIGKILL Prefect":
        time.sleep(HEARD_SECONDS)  # before that, a run that has just ended may still be telling Prefect
    _go_on(ground, home, cell, before, _allowed(place, allowed))
    return cell


def _allowed(place: Place, states: tuple[str, ...]) -> tuple[str, ...]:
    """States that a run may end in: behind its last step, one that is told to stop has nothing left to stop."""
    return (*states, "completed") if place.name == "promote" and "cancelled" in states else states


def _running(home: Path) -> int:
    """Process of the run that is going on."""
    for path in sorted((home / "runs").glob("*.json"), reverse=True):
        record = json.loads(path.read_text())
        if record["status"] == "running":
            return int(record["pid"])
    raise Missed("no run is going on")


def _out(command: subprocess.Popen[str], cell: Cell) -> None:
    """What the person saw holds no traceback of ours."""
    _, err = command.communicate(timeout=LONGEST)
    if "Traceback" in err:
        cell.faults.append("traceback: " + err.strip().splitlines()[-1][:60])


def _no_orphans(find: Callable[[], list[psutil.Process]], cell: Cell) -> None:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        cell.faults.append(f"{len(left)} orphans: {' '.join(left[0].cmdline())[-60:]}")
        kill(left)


def _go_on(ground: Ground, home: Path, cell: Cell, before: int, allowed: tuple[str, ...]) -> None:
    """The next run does the rest, to the same bytes, and leaves nothing open."""
    try:
        answer = run("run", str(ground.recipe), LLAMATUNER_HOME=str(home))
    except AssertionError as error:
        cell.faults.append(f"the next run failed: {str(error).strip().splitlines()[-1][:80]}")
        return
    kept = sum(step["state"] == "cached" for step in answer["steps"])
    cell.next_run = f"{answer['status']} ({kept} of {len(answer['steps'])})"
    cell.ended = record_states(home)[before]
    if cell.ended not in allowed:
        cell.faults.append(f"ended as {cell.ended}, not {' or '.join(allowed)}")
    if digests(answer) != ground.digests:
        cell.faults.append("other bytes")
    if not (answer["gate"] or {}).get("passed"):
        cell.faults.append("the gate was not decided")
    try:
        require_nothing_open(home)
    except AssertionError as error:
        cell.faults.append(f"left open: {str(error).strip().splitlines()[0][:160]}")


@contextmanager
def _folder(home: Path) -> Iterator[None]:
    yield


@contextmanager
def _disk(home: Path) -> Iterator[None]:
    """A small disk of its own.

    Raises:
        CalledProcessError: nothing may be mounted here.
    """
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(home)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(home)], check=True)
