"""Runs that died without a word, closed by the next one."""

from __future__ import annotations

from collections.abc import Callable

from flows.run_records import RunRecord, records
from registry.home import Home
from tasks.tracking import end_dead_run


def reconcile(home: Home, say: Callable[[str], None], own_pid: int) -> None:
    """Mark dead runs crashed here, KILLED in MLflow and Crashed in Prefect.

    Args:
        home: whose runs.
        say: told what was closed.
        own_pid: this process; its record is alive.
    """
    for record in records(home):
        if record.values["pid"] == own_pid or not record.died():
            continue
        record.end("crashed")
        say(f"run {record.values['id']} ended without a word; it is marked crashed")
        _close(home, record, say)


def _close(home: Home, record: RunRecord, say: Callable[[str], None]) -> None:
    mlflow_run, flow_run = record.values.get("mlflow_run_id"), record.values.get("flow_run_id")
    try:
        if mlflow_run:
            end_dead_run(home, mlflow_run, "KILLED")
        if flow_run:
            _crash_flow_run(flow_run)
    except Exception as error:  # noqa: BLE001 - another run's leftovers must not stop this one; what failed is said
        say(f"run {record.values['id']} could not be closed everywhere: {type(error).__name__}: {error}")


def _crash_flow_run(flow_run_id: str) -> None:
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(flow_run_id))
        if run.state and not run.state.is_final():
            client.set_flow_run_state(run.id, Crashed(message="The process died without a word."), force=True)
