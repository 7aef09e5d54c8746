"""Whatever ends a run, nothing of it stays open, and the next run goes on where it was, to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.slots import Wanted, devices_for
from tests.flows.conftest import Server
from tests.flows.processes import (
    adapter,
    checkpoint,
    copy_home,
    kill,
    mlflow_states,
    prefect_states,
    record_states,
    require_gone,
    require_nothing_open,
    tree,
    wait_until,
)
from tests.flows.toy import LONGEST, PROJECT, run, start, states, toy_recipe

pytestmark = pytest.mark.slow
STEPS = 40
TRAINED_AND_MERGED = ("artifacts/train", "artifacts/merge")


def finish(process: subprocess.Popen[str], code: int) -> tuple[dict[str, Any], str]:
    """The answer of a run that ends by itself, and what it told people."""
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return (json.loads(out) if out else {}), err


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe that two processes do at once on a fresh home; nobody disturbs them."""
    root = tmp_path_factory.mktemp("two")
    recipe = toy_recipe(root / "recipe", steps=STEPS)
    raw = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({name: value for name, value in raw.items() if name != "evaluation"}))
    home = str(root / "home")
    processes = [start("run", str(recipe), "--json", LLAMATUNER_HOME=home) for _ in range(2)]
    return {"recipe": str(recipe), "home": root / "home", "ended": [finish(process, 0) for process in processes]}


def test_two_processes_that_start_at_once_share_the_work(two: dict[str, Any]) -> None:
    (first, first_told), (second, second_told) = two["ended"]
    assert {first["status"], second["status"]} <= {"completed", "up-to-date"}
    assert {step["digest"] for step in first["steps"]} == {step["digest"] for step in second["steps"]}
    one, other = states(first), states(second)
    assert {title: sorted((one[title], other[title])) for title in one} == {title: ["cached", "ran"] for title in one}
    assert "locked" not in first_told + second_told
    assert "stopped" not in first_told + second_told  # MLflow tracking
    require_nothing_open(two["home"])


def test_a_run_killed_at_any_moment_goes_on_where_it_was(two: dict[str, Any], home: Path) -> None:
    copy_home(two["home"], home, "artifacts")
    before = len(record_states(home))
    moments: dict[str, Callable[[], bool]] = {
        "training": lambda: checkpoint(home) > 5,
        "merge, the flow only": lambda: any(home.glob("work/merge-*/program.log")),
    }
    for name, moment in moments.items():
        process = start("run", two["recipe"], "--json")
        wait_until(moment, process)
        family = tree(process)
        kill(family[:1] if name == "merge, the flow only" else family)
        require_gone(family[1:], seconds=5)  # what a killed flow started ends by itself
        process.communicate()
    answer = run("run", two["recipe"])
    assert answer["status"] == "completed"
    (trained,) = home.glob("artifacts/train/*/manifest.json")
    assert json.loads(trained.read_text())["counts"]["resumed_from"] > 5
    assert adapter(home) == adapter(two["home"])
    assert record_states(home)[before:] == ["crashed"] * len(moments) + ["completed"]
    require_nothing_open(home)


@pytest.fixture
def served(server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of a Prefect server that the runs of a test are told to use."""
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    return server.database


def test_a_run_told_to_stop_closes_what_it_opened_and_the_next_goes_on(
    two: dict[str, Any], home: Path, served: Path
) -> None:
    copy_home(two["home"], home, *TRAINED_AND_MERGED)
    runs, tracked, reached = len(prefect_states(served)), len(mlflow_states(home)), 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("run", two["recipe"], "--json")
        wait_until(lambda: checkpoint(home) > reached + 2, process)  # noqa: B023 - called in this turn only
        family = tree(process)
        process.send_signal(number)
        answer, _ = finish(process, 130)
        assert answer["status"] == "cancelled"
        require_gone(family)
        reached = checkpoint(home)
    assert prefect_states(served)[runs:] == ["CANCELLED", "CANCELLED"]
    assert set(mlflow_states(home)[tracked:]) == {"KILLED"}

    process = start("run", two["recipe"], "--json")
    wait_until(lambda: checkpoint(home) > reached + 2, process)
    programs = [member for member in tree(process) if "tasks.train.program" in member.cmdline()]
    kill(programs)
    answer, told = finish(process, 0)
    assert len(programs) == 1
    assert f"resumed from step {reached}\n" in told
    assert "sft/train: attempt 2 of 3\n" in told
    assert answer["status"] == "completed"
    assert next(step["resumed_from"] for step in answer["steps"] if step["step"] == "train") > reached
    assert logged_steps(home, answer["mlflow_run_id"]) == list(range(1, STEPS + 1))
    assert adapter(home) == adapter(two["home"])
    require_nothing_open(home, served)


def test_a_run_whose_prefect_server_dies_ends_with_its_step_and_the_next_one_goes_on(
    two: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    copy_home(two["home"], home, *TRAINED_AND_MERGED)
    process = start("run", two["recipe"], "--json")
    wait_until(lambda: checkpoint(home) > 2, process)
    kill([member for member in tree(process) if "flows.prefect_server" in member.cmdline()])
    answer, told = finish(process, 1)
    assert (answer["status"], len(answer["steps"])) == ("failed", 4)
    assert "Prefect's server died, and no step begins without one." in " ".join(told.split())
    assert "Event(" not in told
    assert adapter(home) == adapter(two["home"])  # the training went on to its end
    again = run("run", two["recipe"])
    states = {step["step"]: step["state"] for step in again["steps"]}
    assert (again["status"], states["train"], states["merge"]) == ("completed", "cached", "ran")
    require_nothing_open(home)


def logged_steps(home: Path, root: str) -> list[int]:
    """Steps at which the loss of a pipeline run's stage was logged."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_run(root).info.experiment_id
    (stage,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{root}'")
    return [point.step for point in client.get_metric_history(stage.info.run_id, "loss")]


def test_a_signal_during_start_up_ends_it_at_once(two: dict[str, Any], home: Path) -> None:
    process = start("run", two["recipe"], "--json")
    wait_until(lambda: any("flows.prefect_server" in member.cmdline() for member in tree(process)), process)
    family = tree(process)
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    require_gone(family)
    assert not any(home.glob("runs/*"))


@pytest.mark.usefixtures("served")
def test_a_run_that_waits_for_a_lock_can_be_stopped(two: dict[str, Any], home: Path) -> None:
    copy_home(two["home"], home, *TRAINED_AND_MERGED)
    with devices_for(home / "locks" / "devices", Wanted("other/train"), None, print):
        process = start("run", two["recipe"], "--json")
        assert process.stderr
        for line in process.stderr:
            if f"waiting for the processors: other/train of process {os.getpid()}" in line:
                break
        family = tree(process)
        process.send_signal(signal.SIGTERM)
        answer, _ = finish(process, 130)
    assert answer["status"] == "cancelled"
    require_gone(family)
    assert "running" not in record_states(home)


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """A home on a disk of 200 MB."""
    home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(home)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield home
    subprocess.run(["umount", str(home)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing_half_made(two: dict[str, Any], small_disk: Path) -> None:
    copy_home(two["home"], small_disk, *TRAINED_AND_MERGED)
    process = start("run", two["recipe"], "--json")
    wait_until(lambda: checkpoint(small_disk) > 2, process)
    ballast = small_disk / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=64k"], capture_output=True)  # until the disk is full
    answer, told = finish(process, 1)
    assert answer["status"] == "failed"
    assert f"The disk of {small_disk} is full: free space there or run `llamatuner artifacts gc`" in told
    assert not any(small_disk.glob("artifacts/train/*"))
    ballast.unlink()
    assert run("run", two["recipe"])["status"] == "completed"
    assert adapter(small_disk) == adapter(two["home"])
    require_nothing_open(small_disk)


LOST_EVENTS = """
import json
from registry.home import Home
from flows import reconcile
from flows.prefect_server import prefect_api
from flows.run_records import RunRecord

reconcile.SETTLE_SECONDS = 0.0
home, told = Home.open(), []
with prefect_api(home):
    from prefect import flow, tags, task
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    record = RunRecord.start(home, "toy")
    record.update(steps=[{"stage": "sft", "step": "train", "state": "ran"}])

    @task(task_run_name="{title}")
    def step(title):
        return None

    @flow
    def both():
        step("sft/train")
        step("sft/merge")

    with tags(reconcile.run_tag(record)):
        both()
    with get_client(sync_client=True) as client:
        def task_runs():
            return client.read_task_runs(flow_run_filter=reconcile.tagged(record))

        while len(runs := [run for run in task_runs() if run.state and run.state.is_final()]) < 2:
            continue
        for run in runs:
            client.set_task_run_state(run.id, Running(), force=True)
        reconcile.settle(record, told.append)
        print(json.dumps([{run.name: run.state.name for run in task_runs()}, told]))
    record.end("completed")
"""


@pytest.mark.usefixtures("served")
def test_what_prefect_has_not_heard_in_time_is_written_from_the_record() -> None:
    program = [sys.executable, "-c", LOST_EVENTS]
    done = subprocess.run(program, cwd=PROJECT, capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0, done.stderr
    found, told = json.loads(done.stdout.splitlines()[-1])
    assert found == {"sft/train": "Completed", "sft/merge": "Cancelled"}
    assert "is told of those it knows: sft/merge, sft/train" in told[0]
