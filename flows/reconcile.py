"""Runs that died without a word, closed by the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flows.run_records import RunRecord, records
from registry.home import Home
from tasks.tracking import end_dead_run


def reconcile(home: Home, say: Callable[[str], None]) -> None:
    """Mark dead runs crashed here, KILLED in MLflow and Crashed in Prefect.

    Args:
        home: whose runs.
        say: told what was closed.
    """
    for record in records(home):
        if not record.died():
            continue
        _close(home, record, say)
        record.end("crashed")  # last: whoever is killed before it leaves the rest to the next run
        say(f"run {record.values['id']} ended without a word; it is marked crashed")


def _close(home: Home, record: RunRecord, say: Callable[[str], None]) -> None:
    try:
        end_dead_run(home, record.values["id"], "KILLED")
        _crash_flow_runs(record)
    except Exception as error:  # noqa: BLE001 - another run's leftovers must not stop this one; what failed is said
        say(f"run {record.values['id']} could not be closed everywhere: {type(error).__name__}: {error}")


def run_tag(record: RunRecord) -> str:
    """What a flow run is tagged with: it is there from the start, the flow run's id in the record is not."""
    return f"run:{record.values['id']}"


def _crash_flow_runs(record: RunRecord) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Crashed

    crashed: Any = Crashed(message="The process died without a word.")
    tagged = FlowRunFilter.model_validate({"tags": {"all_": [run_tag(record)]}})
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=tagged):
            for task_run in client.read_task_runs(
                flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
            ):
                if task_run.state and not task_run.state.is_final():
                    client.set_task_run_state(task_run.id, crashed, force=True)
            if run.state and not run.state.is_final():
                client.set_flow_run_state(run.id, crashed, force=True)
