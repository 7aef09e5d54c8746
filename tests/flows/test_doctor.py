"""What crashes leave behind is found, mended where nobody has to be asked, and otherwise said with its cure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.cli.app import run_app
from flows.run_records import RunRecord
from registry.home import Home
from tasks.artifacts import Store
from tasks.locks import locked
from tasks.mlflow_journal import Journal
from tasks.servers import Server, write_servers
from tests.flows.processes import record_states
from tests.flows.test_artifacts_cli import make_data

Capture = pytest.CaptureFixture[str]


def findings(capsys: Capture, code: int) -> dict[str, dict[str, Any]]:
    """What `doctor` tells programs, by check."""
    capsys.readouterr()
    assert run_app(["doctor", "--json"]) == code
    return {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}


def test_a_home_that_nothing_happened_to_is_good(home: Path, capsys: Capture) -> None:
    found = findings(capsys, 0)
    assert list(found) == ["programs", "MLflow", "runs", "servers", "work", "artifacts", "disk"]
    assert {each["state"] for each in found.values()} == {"good"}
    assert run_app(["doctor"]) == 0
    assert "good   runs       none died without a word; 0 going on\n" in capsys.readouterr().out


def test_what_a_next_run_would_mend_is_mended(home: Path, capsys: Capture) -> None:
    here = Home.open()
    lived = RunRecord.start(here, "toy")
    died = RunRecord.start(here, "toy")
    died._alive.close()  # as the end of its process does
    journal = Journal.begin(here, None)
    journal.add(
        {
            "do": "open",
            "run": "waiting-1",
            "name": "late",
            "parent": None,
            "tags": {"llamatuner.opened": "1"},
            "time": 1,
        }
    )
    journal.leave()
    found = findings(capsys, 0)
    assert (found["runs"]["state"], found["MLflow"]["state"]) == ("mended", "mended")
    assert died.values["id"] in found["runs"]["text"]
    assert lived.values["id"] not in found["runs"]["text"]
    assert sorted(record_states(home)) == ["crashed", "running"]
    lived.end("completed")
    assert {each["state"] for each in findings(capsys, 0).values()} == {"good"}


def test_what_somebody_has_to_do_is_said(folder: Path, home: Path, capsys: Capture) -> None:
    make_data(folder / "toy.json")
    here, artifact = Home.open(), next(Store(Home.open()).all())
    file = next(artifact.path / path for path, (size, _) in artifact.files.items() if size)
    file.write_bytes(b"")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_servers(here, {"mlflow": Server(ended.pid, time.time(), "mark", 5000, "http://127.0.0.1:5000")})
    (here.work / "train-0123456789ab").mkdir(parents=True)
    found = findings(capsys, 1)
    assert found["artifacts"]["text"].startswith(f"files are missing or cut in {artifact.step}/{artifact.path.name};")
    assert found["servers"]["text"] == "mlflow died; `llamatuner up` starts what does not run"
    assert found["work"]["text"].startswith("1 steps are begun; the next run of their recipe goes on there")
    assert {name for name, each in found.items() if each["state"] == "bad"} == {"artifacts", "servers"}


def test_a_program_is_ended_when_nobody_holds_the_lock_of_its_step(home: Path, capsys: Capture) -> None:
    here = Home.open()
    programs = []
    for key in ("0123456789ab", "ba9876543210"):
        spec = here.work / f"train-{key}" / "spec.json"
        spec.parent.mkdir(parents=True)
        command = [sys.executable, "-c", "import time; time.sleep(600)", str(spec)]
        programs.append(subprocess.Popen(command, start_new_session=True))
    try:
        orphan, waited_for = programs
        with locked(here.locks / f"ba9876543210{'0' * 20}.lock"):
            text = findings(capsys, 0)["programs"]["text"]
        assert text == f"ended 1 whose flow is gone: process {orphan.pid}"
        assert not psutil.pid_exists(orphan.pid)
        assert waited_for.poll() is None
    finally:
        for program in programs:
            if psutil.pid_exists(program.pid) and program.poll() is None:
                os.kill(program.pid, signal.SIGKILL)
                program.wait()
