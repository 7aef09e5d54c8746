"""All faults, as a table: `make test-faults`, or `python -m tests.faults PLACE EVENT …` for some.

`train merge` are two places with every event, `train SIGTERM` is one cell, `served train` what a server does to it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.faults.events import ALONE, SERVED
from tests.faults.ground import PLACES, Ground, undisturbed
from tests.faults.matrix import HEAD, Cell, alone, cells, served
from tests.flows.processes import copy_home
from tests.flows.toy import run

KINDS = ("alone", "served")


def main(wanted: list[str]) -> int:
    """Run the faults at some places, of some events, `alone` or `served`; 1 when one of them is not good."""
    unknown = [word for word in wanted if word not in {*PLACES, *ALONE, *SERVED, *KINDS}]
    if unknown:
        sys.exit(
            f"{', '.join(unknown)}: no place ({', '.join(PLACES)}), event ({', '.join([*ALONE, *SERVED])}) or kind"
        )
    os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    chosen = {
        kind: [cell for cell in cells(events) if _is_wanted({*cell, kind}, set(wanted))]
        for kind, events in (("alone", ALONE), ("served", SERVED))
    }
    with tempfile.TemporaryDirectory() as folder:
        found = _all(chosen, Path(folder))
    bad = sum(bool(cell.faults) for cell in found)
    print(f"{len(found)} faults, {len(found) - bad} good, {bad} not")
    return 1 if bad else 0


def _all(chosen: Mapping[str, list[tuple[str, str]]], folder: Path) -> list[Cell]:
    """Every fault; those of runs with servers beside those of runs without, each kind one after the other."""
    found: list[Cell] = []
    ranks = {2 if event == "SIGKILL rank" else 1 for each in chosen.values() for _, event in each}
    grounds = {count: undisturbed(folder / f"ground{count}", count) for count in sorted(ranks)}

    def told(cell: Cell) -> None:
        found.append(cell)
        print(f"{cell.line()}\n", end="", flush=True)

    def all_alone() -> None:
        for place, event in chosen["alone"]:
            told(alone(grounds[2 if event == "SIGKILL rank" else 1], place, event, folder / "home"))
            shutil.rmtree(folder / "home")

    def all_served() -> None:
        if chosen["served"]:
            with _servers(grounds[1], folder / "served") as home:
                for place, event in chosen["served"]:
                    told(served(grounds[1], place, event, home))

    print(HEAD, flush=True)
    with ThreadPoolExecutor() as pool:
        for kind in [pool.submit(all_alone), pool.submit(all_served)]:
            kind.result()
    return found


def _is_wanted(cell: set[str], wanted: set[str]) -> bool:
    """Whether a cell has one of the places, one of the events and one of the kinds that are wanted, where some are."""
    groups = (set(PLACES), {*ALONE, *SERVED}, set(KINDS))
    return all(cell & group & wanted or not group & wanted for group in groups)


@contextmanager
def _servers(ground: Ground, home: Path) -> Iterator[Path]:
    """A home with servers that know how to run recipes."""
    copy_home(ground.home, home)
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports.append(str(taken.getsockname()[1]))
    environment = {"LLAMATUNER_HOME": str(home)}
    run("up", "--prefect-port", ports[0], "--mlflow-port", ports[1], **environment)
    run("deploy", "pipeline", **environment)
    try:
        yield home
    finally:
        run("down", **environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
