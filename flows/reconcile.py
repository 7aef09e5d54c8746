"""Runs that died without a word, closed by the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flows.launching import jobs_without_run
from flows.run_records import RunRecord, records
from registry.home import Home
from tasks.tracking import end_dead_run, tell_what_waits

SETTLE_SECONDS = 10.0
HEARD_SECONDS = 20.0  # by then Prefect has heard how a run ended, if it was there
RECENT = 50  # ended runs that Prefect is asked about


def reconcile(home: Home, say: Callable[[str], None]) -> None:
    """Mark dead runs crashed here, KILLED in MLflow and Crashed in Prefect.

    Args:
        home: whose runs.
        say: told what was closed.
    """
    tell_what_waits(home, say)
    for record in records(home):
        if record.values.get("left_open"):
            _end_everywhere(home, record, say)
        if not record.died():
            continue
        if _closed(home, record, say):
            record.end("crashed")  # last: whoever is killed before it leaves the rest to the next run
            say(f"run {record.values['id']} ended without a word; it is marked crashed")
    for job in jobs_without_run(home):
        say(f"{job}, and its run died; the next run of its recipe takes it over, `llamatuner artifacts gc` ends it")
    try:
        _tell_ends(home)
    except Exception as error:  # noqa: BLE001 - as above
        say(f"Prefect could not be told how earlier runs ended: {type(error).__name__}: {error}")


def _end_everywhere(home: Home, record: RunRecord, say: Callable[[str], None]) -> None:
    """Close what a run that has ended could not: its disk was full, or MLflow or Prefect did not take it."""
    from prefect.client.orchestration import get_client

    name, status = record.values["id"], record.values["status"]
    try:
        end_dead_run(home, name, {"completed": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))
        with get_client(sync_client=True) as client:
            _end_in_prefect(client, record)
        record.update(left_open=False)
        say(f"run {name} could not be closed everywhere when it ended; now it is, as {status}")
    except Exception as error:  # noqa: BLE001 - as below
        say(f"run {name} could not be closed everywhere: {type(error).__name__}: {error}")


def _closed(home: Home, record: RunRecord, say: Callable[[str], None]) -> bool:
    try:
        end_dead_run(home, record.values["id"], "KILLED")
        _crash_flow_runs(record)
    except Exception as error:  # noqa: BLE001 - another run's leftovers must not stop this one; what failed is said
        say(f"run {record.values['id']} could not be closed everywhere: {type(error).__name__}: {error}")
        return False
    return True


def _tell_ends(home: Home) -> None:
    """Tell Prefect how runs ended that it calls running: its server was away when they ended."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter

    before = (datetime.now(UTC) - timedelta(seconds=HEARD_SECONDS)).isoformat(timespec="seconds")
    ended = [record for record in records(home) if record.values.get("ended", "9") < before][:RECENT]
    if not ended:
        return
    of_them = {"tags": {"any_": [run_tag(record) for record in ended]}}
    going_on = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    with get_client(sync_client=True) as client:
        open_runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(of_them | going_on))
        tasks = client.read_task_runs(
            flow_run_filter=FlowRunFilter.model_validate(of_them),
            task_run_filter=TaskRunFilter.model_validate(going_on),
        )
        if open_runs or _unheard(tasks):
            for record in ended:
                _end_in_prefect(client, record)


def _end_in_prefect(client: Any, record: RunRecord) -> None:
    """What Prefect calls running of a run that has ended, as the record has it."""
    steps = {f"{step['stage']}/{step['step']}": step["state"] for step in record.values.get("steps", [])}
    for task in _unheard(client.read_task_runs(flow_run_filter=tagged(record))):
        client.set_task_run_state(task.id, _final(steps.get(task.name)), force=True)
    for run in client.read_flow_runs(flow_run_filter=tagged(record)):
        if is_open(run):
            client.set_flow_run_state(run.id, _ended_as(record.values["status"]), force=True)


def _ended_as(status: str) -> Any:
    """Prefect's state for that of a record."""
    from prefect import states

    kind = {"completed": states.Completed, "failed": states.Failed, "cancelled": states.Cancelled}
    return kind.get(status, states.Crashed)(message=f"{status}; Prefect could not be told when it ended")


def run_tag(record: RunRecord) -> str:
    """What a flow run is tagged with: it is there from the start, the flow run's id in the record is not."""
    return f"run:{record.values['id']}"


def tag_flow_run(record: RunRecord, flow_run_id: str) -> None:
    """Give a flow run that Prefect started the tag of its record; ours are started with it."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(flow_run_id))
        client.update_flow_run(run.id, tags=[*run.tags, run_tag(record)])


def settle(record: RunRecord, say: Callable[[str], None]) -> None:
    """Wait until Prefect's API has the last words of a run: its log lines, and how its tasks ended.

    Task states travel as events, behind the run's back, and the server writes them in batches. A server that is ended
    before they are in shows a finished task as running for ever. A server that is slow is waited for while it goes on
    hearing; what has not come then is written directly, from the record, and what cannot be written yet is left to
    the next run.

    Args:
        record: of the run.
        say: told when the API is not there any more, or has not heard everything in time.
    """
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()
    deadline, heard = time.monotonic() + SETTLE_SECONDS, 0
    steps = [step for step in record.values.get("steps", []) if step["state"] != "not_run"]
    ended = {f"{step['stage']}/{step['step']}": step["state"] for step in steps}
    try:
        with get_client(sync_client=True) as client:
            while True:
                known = client.read_task_runs(flow_run_filter=tagged(record))
                unheard = _unheard(known)
                unknown = sorted(ended.keys() - {run.name for run in known})  # not even their beginning has come
                if not unheard and not unknown:
                    return
                if len(known) - len(unheard) > heard:
                    deadline, heard = time.monotonic() + SETTLE_SECONDS, len(known) - len(unheard)
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            names = ", ".join([*(run.name for run in unheard), *unknown])
            say(f"Prefect has not heard how these ended, and is told of those it knows: {names}")
            for run in unheard:
                client.set_task_run_state(run.id, _final(ended.get(run.name)), force=True)
        if unknown:
            leave_open(record, say)
    except HTTPError as error:
        say(f"Prefect's API could not be asked how the run ended: {type(error).__name__}: {error}")
        leave_open(record, say)


def leave_open(record: RunRecord, say: Callable[[str], None]) -> None:
    """Have the next run close what this one could not."""
    try:
        record.update(left_open=True)
    except OSError as fault:  # the next run but one finds it out by itself, see `_tell_ends`
        say(f"nor could that be written down: {fault}")


def is_open(run: Any) -> bool:
    """Whether Prefect calls a flow run or task run neither ended nor unknown.

    By the type that the run's own row has: a server that is killed while it writes tasks leaves the row without the
    state that it names, and the API then gives none.
    """
    from prefect.client.schemas.objects import TERMINAL_STATES

    return run.state_type is not None and run.state_type not in TERMINAL_STATES


def _unheard(task_runs: list[Any]) -> list[Any]:
    """The tasks that have begun and not ended, as far as the API knows."""
    return [run for run in task_runs if run.state_type == "RUNNING" or run.state_name == "Pending"]


def _final(state: str | None) -> Any:
    """Prefect's state for a step's, as the record has it; None: the record has none."""
    from prefect.states import Cancelled, Completed, Failed

    if state is None:
        return Cancelled(message="The run ended before this step did.")
    kind = Failed if state == "failed" else Completed
    return kind(message=f"{state}; told by the record of the run")


def tagged(record: RunRecord) -> Any:
    """Prefect's filter for the flow runs of a record."""
    from prefect.client.schemas.filters import FlowRunFilter

    return FlowRunFilter.model_validate({"tags": {"all_": [run_tag(record)]}})


def _crash_flow_runs(record: RunRecord) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    crashed: Any = Crashed(message="The process died without a word.")
    with get_client(sync_client=True) as client:
        for task_run in client.read_task_runs(flow_run_filter=tagged(record)):
            if is_open(task_run):
                client.set_task_run_state(task_run.id, crashed, force=True)
        for run in client.read_flow_runs(flow_run_filter=tagged(record)):
            if is_open(run):
                client.set_flow_run_state(run.id, crashed, force=True)
