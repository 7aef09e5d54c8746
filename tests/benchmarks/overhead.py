"""`make bench-overhead MODEL=FOLDER`: what Prefect and MLflow cost, beside a bare script that does the same steps.

Three ways do the recipe `demo` in turns, each in a fresh home: a plain loop over its steps (no flow, no server, nothing
tracked), `llamatuner run`, which brings its own Prefect API along, and `llamatuner submit` to servers that are up. What
is timed is the whole command, as a person waits for it.

    python -m tests.benchmarks.overhead MODEL [--rounds 2] [--recipe demo]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import machine
from tests.flows.test_servers import free_port
from tests.flows.toy import PROJECT, run

BARE, EMBEDDED, SERVED = "bare script", "llamatuner run", "llamatuner submit"


def bare(recipe: str, overrides: list[str]) -> None:
    """Do a recipe's steps one after the other."""
    from flows.graph import build
    from registry.home import Home
    from registry.loading import load_recipe
    from tasks.artifacts import Store
    from tasks.digests import DigestMemory
    from tasks.steps import do

    home = Home.open()
    store, memory, stop = Store(home), DigestMemory(home.digests), threading.Event()

    def quiet(event: dict[str, Any]) -> None:
        del event

    for step in build(load_recipe(recipe, overrides), home).steps:
        do(step, store, memory, stop, quiet)


def timed(command: list[str], home: Path) -> float:
    """Seconds that a command takes.

    Raises:
        CalledProcessError: it failed.
    """
    started = time.perf_counter()
    environment = os.environ | {"LLAMATUNER_HOME": str(home)}
    subprocess.run([sys.executable, *command], cwd=PROJECT, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def one_round(recipe: str, override: str, folder: Path) -> dict[str, float]:
    """Seconds of each way."""
    given, found = [recipe, "--set", override], {}
    found[BARE] = timed(["-m", "tests.benchmarks.overhead", "--bare", *given], folder / "bare")
    found[EMBEDDED] = timed(["-m", "flows", "run", *given], folder / "run")
    served = folder / "served"
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    run("up", *ports, LLAMATUNER_HOME=str(served))
    try:
        run("deploy", "pipeline", recipe, LLAMATUNER_HOME=str(served))
        found[SERVED] = timed(["-m", "flows", "submit", *given], served)
    finally:
        run("down", LLAMATUNER_HOME=str(served))
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare(given.model, given.set)
        return
    if given.model is None:
        parser.error("name the model's folder")
    rounds = []
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            found = one_round(given.recipe, f"model_name_or_path={given.model}", Path(folder))
        rounds.append(found)
        print(
            f"round {number + 1}: " + ", ".join(f"{way} {seconds:.1f} s" for way, seconds in found.items()), flush=True
        )
    print(f"\n{machine()}\n\n| way | median | more than the bare script |\n| --- | --- | --- |")
    base = statistics.median(each[BARE] for each in rounds)
    for way in (BARE, EMBEDDED, SERVED):
        more = [each[way] - each[BARE] for each in rounds]
        middle = statistics.median(more)
        note = "" if way == BARE else f"{middle:+.1f} s ({middle / base:.1%})"
        print(f"| {way} | {statistics.median(each[way] for each in rounds):.1f} s | {note} |")


if __name__ == "__main__":
    main()
