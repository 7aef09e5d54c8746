"""Several pipelines at once, on several workers: what they share is computed once, and no database is called locked.

`python -m tests.faults.together` uses the SQLite databases of a home, or what `PREFECT_API_DATABASE_CONNECTION_URL` and
`MLFLOW_BACKEND_STORE_URI` name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flows.services import worker_name
from registry.home import Home
from tasks.servers import PREFECT, read_servers
from tests.faults.ground import STEPS
from tests.flows.processes import record_states
from tests.flows.test_servers import free_port
from tests.flows.toy import LONGEST, run, start, states, toy_recipe, write_rows

PIPELINES, ROWS = 3, 3000
SHARED = ("fetch", "render", "tokenize")


def recipes(folder: Path) -> list[Path]:
    """Recipes with the same data and other learning rates."""
    toy = toy_recipe(folder, steps=STEPS)
    write_rows(folder / "train.jsonl", ROWS)
    found = []
    for number in range(PIPELINES):
        raw = json.loads(toy.read_text())
        raw["name"] = f"toy{number}"
        raw["stages"]["sft"]["learning_rate"] = 10.0 ** -(2 + number)
        found.append(folder / f"toy{number}.json")
        found[-1].write_text(json.dumps(raw))
    return found


def second_worker(home: Path) -> subprocess.Popen[bytes]:
    """A worker beside that of `up`."""
    environment = os.environ | {
        "LLAMATUNER_HOME": str(home),
        "PREFECT_API_URL": str(read_servers(Home(home))[PREFECT].url),
        "PREFECT_HOME": str(home / "prefect"),
    }
    command = ["prefect", "worker", "start", "--pool", "llamatuner", "--type", "process", "--name"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, f"{worker_name()}-2"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def together(folder: Path) -> list[str]:
    """Run them; everything that is not as it must be."""
    home, faults = folder / "home", list[str]()
    environment = {"LLAMATUNER_HOME": str(home)}
    made = recipes(folder / "recipe")
    run("up", "--prefect-port", str(free_port()), "--mlflow-port", str(free_port()), **environment)
    worker = None
    try:
        run("deploy", "pipeline", **environment)
        worker = second_worker(home)
        started = time.monotonic()
        commands = [start("submit", str(recipe), "--json", **environment) for recipe in made]
        answers = []
        for command in commands:
            out, err = command.communicate(timeout=LONGEST)
            if command.returncode != 0:
                faults.append(f"exit code {command.returncode}: {err.strip().splitlines()[-1][:100]}")
            if "locked" in err:
                faults.append("somebody was told of a locked database")
            answers.append(json.loads(out.splitlines()[-1]) if out.strip() else {"steps": []})
        print(f"{PIPELINES} pipelines in {time.monotonic() - started:.0f} s", flush=True)
        faults += _computed_twice(home)
        if record_states(home) != ["completed"] * PIPELINES:
            faults.append(f"runs ended as {record_states(home)}")
    finally:
        if worker is not None:
            worker.terminate()
            worker.wait(60)
        run("down", **environment)
    return faults


def _computed_twice(home: Path) -> list[str]:
    """Data steps that more than one run made."""
    made: dict[str, int] = {}
    for path in (home / "runs").glob("*.json"):
        record: dict[str, Any] = json.loads(path.read_text())
        for title, state in states({"steps": record.get("steps", [])}).items():
            if title.split("/")[1].split(":")[0] in SHARED:
                made[title] = made.get(title, 0) + (state == "ran")
    return [f"{title} was made {count} times" for title, count in made.items() if count != 1]


def main() -> int:
    """Run them once; 1 when something is not as it must be."""
    with tempfile.TemporaryDirectory() as folder:
        faults = together(Path(folder))
    print("\n".join(faults) or "every shared step computed once, all completed, nothing locked")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
