"""What MLflow cannot be told waits in the home, and is told once, whoever dies in between."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.home import Home
from tasks import tracking
from tasks.artifacts import Artifact
from tasks.tracking import Tracker, mlflow_client, tell_what_waits

pytestmark = pytest.mark.slow
LOST = "MLflow cannot be reached: "
AGAIN = "MLflow can be reached again and has been told everything"


class MlflowServer:
    """A server at one port, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        self.url, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        database = ["--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1", *database]
        log = (self._folder / "mlflow.log").open("ab")
        self._process = subprocess.Popen(
            command,
            cwd=self._folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"MLFLOW_TRACKING_URI": ""},
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "mlflow.log").read_text()
                time.sleep(0.1)
        raise AssertionError("the server never answered")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """A server that does not run yet, and which runs are told to use."""
    server = MlflowServer(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.0)
    yield server
    server.kill()


def known(server: MlflowServer) -> dict[str, dict[str, Any]]:
    """What the server knows of each run, by name; as often as it knows it."""
    client = mlflow_client(Home.open(), server.url)
    experiment = client.get_experiment_by_name("llamatuner").experiment_id
    runs = client.search_runs([experiment])
    assert len({run.info.run_name for run in runs}) == len(runs)
    names = {run.info.run_id: run.info.run_name for run in runs}
    return {
        run.info.run_name: {
            "status": run.info.status,
            "parent": names.get(run.data.tags.get("mlflow.parentRunId")),
            "params": run.data.params,
            "loss": [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")],
            "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
            "inputs": [each.dataset.name for each in run.inputs.dataset_inputs],
            "model": run.data.tags.get("llamatuner.model"),
            "versions": len(client.search_model_versions(f"run_id='{run.info.run_id}'")),
        }
        for run in runs
    }


def tell_of_a_run(tracker: Tracker, name: str, artifact: Path, between: Any = lambda: None) -> None:
    """All that a run tells, with something that happens between two steps of its training."""
    tracker.start(name, {"llamatuner.run": name}, {"name": name})
    stage = tracker.open(f"{name} stage", tracker.run_id, {})
    tracker.params(stage, {"learning_rate": 0.1})
    tracker.metrics(stage, {"loss": 3.0}, 1)
    between()
    tracker.metrics(stage, {"loss": 2.0}, 2)
    tracker.metrics(stage, {"loss": 2.5}, 2)  # of a step that a resumed program did again
    tracker.inputs(stage, {"rows": ("rows.jsonl", "1" * 64)}, "training")
    tracker.file(stage, artifact / "manifest.json")
    tracker.content(stage, lambda: b"a picture", "picture.png")
    made = Artifact(artifact, {"step": "merge", "key": "2" * 64, "digest": "3" * 64})
    tracker.register(stage, name, made, {"stage": "sft"})
    tracker.close_all("FINISHED")


def of(name: str) -> dict[str, dict[str, Any]]:
    """What is to be known of such a run."""
    nothing = {"params": {}, "loss": [], "inputs": [], "model": None, "versions": 0}
    return {
        name: nothing | {"status": "FINISHED", "parent": None, "files": ["recipe.yaml"]},
        f"{name} stage": {
            "status": "FINISHED",
            "parent": name,
            "params": {"learning_rate": "0.1"},
            "loss": [(1, 3.0), (2, 2.0)],
            "files": ["manifest.json", "picture.png"],
            "inputs": ["rows"],
            "model": f"{name}/1",
            "versions": 1,
        },
    }


def test_what_waits_is_told_once_and_in_order(server: MlflowServer, tmp_path: Path) -> None:
    home, said, artifact = Home.open(), list[str](), tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "manifest.json").write_text("{}")
    tracker = Tracker(home, said.append)
    tell_of_a_run(tracker, "without", artifact)
    assert tracker.root is None
    assert [line[: len(LOST)] for line in said] == [LOST, "MLflow still cannot be rea"]
    assert tell_what_waits(home, said.append) is False

    server.start()
    (journal,) = (home.mlflow / "journal").iterdir()
    kept = shutil.copy(journal, tmp_path / "kept")
    assert tell_what_waits(home, said.append) is True
    assert known(server) == of("without")
    shutil.copy(kept, journal)  # as if the process had died before it could forget it
    assert tell_what_waits(home, said.append) is True
    assert known(server) == of("without")
    assert list((home.mlflow / "journal").iterdir()) == []

    said.clear()
    tracker = Tracker(home, said.append)

    def away() -> None:
        server.kill()
        tracker.metrics(tracker.run_id, {"loss": 1.0}, 1)
        assert tracker.root is not None
        server.start()

    tell_of_a_run(tracker, "meanwhile", artifact, away)
    assert [line[: len(LOST)] for line in said] == [LOST, AGAIN[: len(LOST)]]
    found, wanted = known(server), of("meanwhile")
    wanted["meanwhile"]["loss"] = [(1, 1.0)]
    assert {name: found[name] for name in wanted} == wanted


def test_what_mlflow_will_never_take_is_said_and_left_out(home: Path) -> None:
    said: list[str] = []
    tracker = Tracker(Home.open(), said.append)
    tracker.start("run", {}, {})
    tracker.params(tracker.run_id, {"learning_rate": 1})
    tracker.params(tracker.run_id, {"learning_rate": 2})
    tracker.params(tracker.run_id, {"seed": 3})
    tracker.close_all("FINISHED")
    (line,) = said
    assert line.startswith("MLflow does not take params of a run: MlflowException: ")
    run = mlflow_client(Home.open()).get_run(tracker.root)
    assert (run.data.params, run.info.status) == ({"learning_rate": "1", "seed": "3"}, "FINISHED")


def test_a_damaged_journal_stops_nobody(home: Path) -> None:
    folder, said = home / "mlflow" / "journal", list[str]()
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text("no json\n")
    assert tell_what_waits(Home.open(), said.append) is False
    (line,) = said
    assert line.startswith("what MLflow is to be told of an earlier run still waits: JSONDecodeError")
