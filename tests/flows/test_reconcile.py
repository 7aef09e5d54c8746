"""What a run that ended could not close is closed by the next one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from flows.reconcile import reconcile, run_tag, tagged
from flows.run_records import RunRecord
from registry.home import Home
from tasks.tracking import RUN_TAG, Tracker
from tests.flows.conftest import Server
from tests.flows.processes import mlflow_states
from tests.flows.test_deploying import wait_for

FULL = "CREATE TRIGGER full BEFORE UPDATE ON runs BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
CLOSED = "run {} could not be closed everywhere when it ended; now it is, as failed"


def change(home: Path, statement: str) -> None:
    """Change MLflow's database."""
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database, database:
        database.execute(statement)


@pytest.mark.slow
def test_what_mlflow_did_not_take_the_end_of_is_ended_by_the_next_run(
    home: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    here, said = Home.open(), list[str]()
    record = RunRecord.start(here, "toy")
    name = record.values["id"]
    tracker = Tracker(here, said.append)
    tracker.start(name, {RUN_TAG: name}, {"name": "toy"})
    tracker.open("sft", tracker.run_id, {RUN_TAG: name})
    change(home, FULL)
    tracker.close_all("FAILED")
    assert tracker.left_open
    record.end("failed", left_open=tracker.left_open)
    assert mlflow_states(home) == ["RUNNING", "RUNNING"]

    reconcile(here, said.append)
    assert said[-1].startswith(f"run {name} could not be closed everywhere: ")
    change(home, "DROP TRIGGER full")
    reconcile(here, said.append)
    assert said[-1] == CLOSED.format(name)
    assert mlflow_states(home) == ["FAILED", "FAILED"]
    told = len(said)
    reconcile(here, said.append)
    assert len(said) == told


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False], ids=["what the run knew", "what nobody wrote down"])
def test_what_prefect_did_not_take_the_end_of_is_ended_by_a_later_run(
    told: bool, home: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    from prefect import flow, tags, task
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    @task(task_run_name="{title}")
    def step(title: str) -> None:
        del title

    @flow
    def three() -> None:
        for title in ("sft/fetch", "sft/train", "sft/merge"):
            step(title)

    here, said = Home.open(), list[str]()
    record = RunRecord.start(here, "toy")
    with tags(run_tag(record)):
        three()
    with get_client(sync_client=True) as client:

        def tasks() -> dict[str, Any]:
            return {run.name: run for run in client.read_task_runs(flow_run_filter=tagged(record))}

        wait_for(lambda: sum(bool(run.state and run.state.is_final()) for run in tasks().values()) == 3)
        (flow_run,) = client.read_flow_runs(flow_run_filter=tagged(record))
        running: Any = Running()
        client.set_flow_run_state(flow_run.id, running, force=True)
        for title in ("sft/train", "sft/merge"):
            client.set_task_run_state(tasks()[title].id, running, force=True)
        steps = [
            {"stage": "sft", "step": "fetch", "state": "ran"},
            {"stage": "sft", "step": "train", "state": "failed"},
        ]
        with closing(sqlite3.connect(server.database, timeout=30)) as database, database:
            # as a server leaves it that is killed between the two: the task's row, without the state that it names
            database.execute("UPDATE task_run SET state_id = ? WHERE name = 'sft/merge'", [str(uuid4())])
        assert tasks()["sft/merge"].state is None
        record.end("failed", steps=steps, left_open=told)
        if not told:
            record.update(ended=(datetime.now(UTC) - timedelta(minutes=1)).isoformat(timespec="seconds"))
        reconcile(here, said.append)
        assert said == ([CLOSED.format(record.values["id"])] if told else [])
        found = {title: run.state.name for title, run in tasks().items()}
        assert found == {"sft/fetch": "Completed", "sft/train": "Failed", "sft/merge": "Cancelled"}
        assert client.read_flow_run(flow_run.id).state.name == "Failed"


def test_a_run_that_mlflow_knows_the_end_of_is_left_alone(home: Path) -> None:
    here, said = Home.open(), list[str]()
    RunRecord.start(here, "toy").end("failed")
    reconcile(here, said.append)
    assert said == []
    assert not (home / "mlflow").exists()
