"""What a run that ended could not close is closed by the next one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flows.reconcile import reconcile
from flows.run_records import RunRecord
from registry.home import Home
from tasks.tracking import RUN_TAG, Tracker
from tests.flows.processes import mlflow_states

FULL = "CREATE TRIGGER full BEFORE UPDATE ON runs BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"


def change(home: Path, statement: str) -> None:
    """Change MLflow's database."""
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database, database:
        database.execute(statement)


@pytest.mark.slow
def test_what_mlflow_did_not_take_the_end_of_is_ended_by_the_next_run(home: Path) -> None:
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
    assert said[-1].startswith(f"run {name} could not be closed in MLflow: ")
    change(home, "DROP TRIGGER full")
    reconcile(here, said.append)
    assert said[-1] == f"run {name} was still open in MLflow; it is marked failed"
    assert mlflow_states(home) == ["FAILED", "FAILED"]
    told = len(said)
    reconcile(here, said.append)
    assert len(said) == told


def test_a_run_that_mlflow_knows_the_end_of_is_left_alone(home: Path) -> None:
    here, said = Home.open(), list[str]()
    RunRecord.start(here, "toy").end("failed")
    reconcile(here, said.append)
    assert said == []
    assert not (home / "mlflow").exists()
