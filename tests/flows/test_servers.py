"""Servers are started once, found by runs, found dead, started anew, and ended with all they started."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.cli.app import run_app
from flows.run_records import RunRecord
from flows.servers import family
from registry.home import Home
from tasks.servers import Server, read_servers
from tests.flows.processes import kill, mlflow_states, prefect_states, record_states, require_gone
from tests.flows.toy import LONGEST, run, start, toy_recipe
from tests.small_hub import serving

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
NAMES = ["prefect", "mlflow", "worker"]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pids(home: Path) -> dict[str, int]:
    """Name → process id, as recorded."""
    return {name: server.pid for name, server in read_servers(Home(home)).items()}


def told(*arguments: str, code: int, capsys: Capture) -> dict[str, Any]:
    """Run a command in this process; what it tells programs."""
    capsys.readouterr()
    assert run_app([*arguments, "--json"]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose servers run."""
    home = tmp_path_factory.mktemp("served") / "home"
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    run("up", *ports, LLAMATUNER_HOME=str(home))
    yield home
    run("down", LLAMATUNER_HOME=str(home))


@pytest.fixture
def here(served: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That home, as the home of this process."""
    monkeypatch.setenv("LLAMATUNER_HOME", str(served))
    return served


def test_servers_that_run_are_kept_and_another_port_is_refused(here: Path, capsys: Capture) -> None:
    before = pids(here)
    assert list(before) == NAMES
    answer = told("up", code=0, capsys=capsys)
    assert pids(here) == before
    assert answer["servers"]["prefect"]["url"] == read_servers(Home(here))["prefect"].url
    problem = told("up", "--prefect-port", "1", code=2, capsys=capsys)["problems"][0]
    assert re.fullmatch(r"prefect already runs on port \d+, not 1", problem["rule"])
    assert problem["cure"] == "End it with `llamatuner down` first."


def test_runs_use_them(here: Path, tmp_path: Path) -> None:
    process = start("prepare", str(toy_recipe(tmp_path / "recipe")), "--json")
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1  # MLflow prints addresses of runs when it talks to a server
    answer = json.loads(out)
    assert answer["status"] == "completed"
    assert f"Prefect pages: {read_servers(Home(here))['prefect'].url}".removesuffix("/api") in err
    assert not (here / "prefect" / "server.log").exists()  # of a server that a run brings along
    assert (here / "mlflow" / "artifacts" / answer["mlflow_run_id"] / "artifacts" / "recipe.yaml").is_file()
    assert prefect_states(here / "prefect" / "prefect.db") == ["COMPLETED"]
    assert set(mlflow_states(here)) == {"FINISHED"}
    assert record_states(here) == ["completed"]


def test_they_are_not_ended_under_a_run(here: Path, capsys: Capture) -> None:
    record = RunRecord.start(Home(here), "toy")
    record.update(prefect_api=read_servers(Home(here))["prefect"].url)
    try:
        (listed,) = told("status", code=0, capsys=capsys)["runs"]
        assert (listed["recipe"], listed["pid"]) == ("toy", os.getpid())
        (problem,) = told("down", code=2, capsys=capsys)["problems"]
        assert problem["rule"] == f"process {os.getpid()} runs toy and reports to these servers"
    finally:
        record.end("completed")


def test_killed_ones_are_told_of_and_started_again_where_they_were(here: Path, capsys: Capture) -> None:
    before = read_servers(Home(here))
    everything = [process for server in before.values() for process in family(server)]
    assert len(everything) > len(NAMES)  # MLflow's has a child, which is left when it is killed
    killed = [psutil.Process(server.pid) for server in before.values()]
    kill(killed)
    require_gone(killed)
    answer = told("status", code=1, capsys=capsys)
    assert {name: line["state"] for name, line in answer["servers"].items()} == dict.fromkeys(NAMES, "dead")
    assert answer["status"] == "partly"
    told("submit", "demo", code=2, capsys=capsys)  # no server, so nothing to submit to
    told("up", code=0, capsys=capsys)
    after = read_servers(Home(here))
    require_gone(everything, seconds=0)
    assert [server.port for server in after.values()] == [server.port for server in before.values()]
    assert {line["state"] for line in told("status", code=0, capsys=capsys)["servers"].values()} == {"healthy"}


def test_without_its_worker_nothing_is_submitted(here: Path) -> None:
    run("deploy", "demo")  # in a process of its own: Prefect keeps the address of the first server it hears of
    runs = len(prefect_states(here / "prefect" / "prefect.db"))
    worker = psutil.Process(pids(here)["worker"])
    kill([worker])
    require_gone([worker])
    (problem,) = run("submit", "demo", code=2)["problems"]
    assert problem["rule"] == "no worker is alive that would do the run"
    assert len(prefect_states(here / "prefect" / "prefect.db")) == runs


def test_the_logs_are_shown(here: Path, capsys: Capture) -> None:
    assert run_app(["logs", "-n", "1000"]) == 0
    out = capsys.readouterr().out
    assert [f"==> {name} <==" in out for name in NAMES] == [True, True, True]
    assert run_app(["logs", "worker", "-n", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert run_app(["logs", "wroker"]) == 2


def test_down_ends_all_of_them_and_their_children(here: Path, capsys: Capture) -> None:
    servers = read_servers(Home(here))
    everything = [process for server in servers.values() for process in family(server)]
    assert everything
    told("down", code=0, capsys=capsys)
    require_gone(everything, seconds=0)
    assert told("status", code=1, capsys=capsys)["status"] == "down"
    assert told("down", code=0, capsys=capsys)["ended"] == []
    assert not (here / "servers.json").exists()


def test_a_port_that_is_taken_is_named_before_anything_starts(home: Path, capsys: Capture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        problems = told("up", "--prefect-port", port, "--mlflow-port", port, code=2, capsys=capsys)["problems"]
    assert [problem["rule"] for problem in problems] == [
        "another program listens there; prefect needs it",
        "another program listens there; mlflow needs it",
        f"{port} is Prefect's port too",
    ]
    assert problems[0]["cure"].startswith("Choose another one: `llamatuner up --prefect-port ")
    assert not (home / "servers.json").exists()
    assert not (home / "logs").exists()


def test_one_that_does_not_come_up_shows_the_end_of_its_log(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "nothing://at-all")
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////no/such/folder/prefect.db")
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    error = told("up", *ports, code=1, capsys=capsys)["error"]
    assert error.startswith(f"Prefect ended before it answered. The end of {home}/logs/prefect.log:\n")
    assert "unable to open database file" in error
    assert not (home / "servers.json").exists()


class Busy(BaseHTTPRequestHandler):
    """Prefect's server while others hold its database: healthy, and nothing else."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


def test_a_server_whose_database_is_locked_is_said_in_one_line(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.services.BUSY_SECONDS", 0.0)
    home.mkdir()
    with serving(Busy) as address:
        began = psutil.Process().create_time()
        server = Server(os.getpid(), began, "0" * 32, int(address.rpartition(":")[2]), f"{address}/api")
        (home / "servers.json").write_text(json.dumps({"prefect": vars(server)}))
        assert run_app(["status"]) == 1
    said = "error: Prefect's server does not say what runs: its database is locked by others. Try again in a moment.\n"
    assert capfd.readouterr().err == said


def test_a_process_id_that_somebody_else_has_by_now_is_left_alone(home: Path, capsys: Capture) -> None:
    home.mkdir()
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        began = psutil.Process(stranger.pid).create_time() - 5
        old = Server(stranger.pid, began, "0" * 32, 4200, "http://127.0.0.1:4200/api")
        (home / "servers.json").write_text(json.dumps({"prefect": vars(old)}))
        assert told("status", code=1, capsys=capsys)["servers"]["prefect"]["state"] == "dead"
        assert told("down", code=0, capsys=capsys)["ended"] == []
        assert stranger.poll() is None
    finally:
        stranger.communicate()
