"""Runs that a worker does: started, followed, and what they came to.

One decision: the run does not depend on who follows it. Whoever stops following, or loses the server for a while, finds
it by its id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flows.deploying import ANY, require_worker
from registry.errors import InputError, Problem
from registry.home import Home
from registry.loading import find_recipe, load_recipe
from registry.recipes import RECIPES

BAD_INPUT_MARK = "Bad input: "  # how the message of a run begins that failed for what a person did wrong
POLL_SECONDS = 1.0
LOG_PAGE = 200  # lines asked for at once: the most that Prefect gives
LATE_SECONDS = 4.0  # Prefect sends lines every 2 s
LOST_SECONDS = 120.0  # how long a server may be away while a run is followed


@dataclass(frozen=True)
class Order:
    """What is asked of a worker, found to be right here."""

    deployment: str
    """`flow/deployment`."""
    parameters: dict[str, Any]


def order(recipe: str, overrides: Sequence[str]) -> Order:
    """Validate a recipe and what is changed in it, and say which deployment does it.

    Raises:
        InputError: everything that is wrong, at once.
    """
    load_recipe(recipe, overrides)
    path = find_recipe(recipe)
    shipped = recipe in RECIPES and RECIPES[recipe] == path
    name, given = (recipe, recipe) if shipped else (ANY, str(path))
    return Order(f"{ANY}/{name}", {"recipe": given, "overrides": list(overrides)})


def start(client: Any, wanted: Order, home: Home, tags: Sequence[str] = ()) -> Any:
    """Start the run; Prefect's flow run.

    Args:
        client: of the server that has the deployment.
        wanted: what is to be done.
        home: whose worker may do it.
        tags: of the run, beside those of the deployment.

    Raises:
        InputError: the deployment is not there, or nobody would do it.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        deployment = client.read_deployment_by_name(wanted.deployment)
    except ObjectNotFound as error:
        name = wanted.deployment.removeprefix(f"{ANY}/")
        cure = f"Register it with `llamatuner deploy {name}`."
        raise InputError(Problem(wanted.deployment, "this Prefect server has no such deployment", cure)) from error
    require_worker(client, home)
    return client.create_flow_run_from_deployment(deployment.id, parameters=wanted.parameters, tags=tags)


def follow(client: Any, flow_run_id: Any, say: Callable[[str], None]) -> Any:
    """Tell the log of a run, and its states, until it ends; the last state."""
    from httpx import HTTPError

    log, shown, heard = _Log(client, flow_run_id, say), "", time.monotonic()
    while True:
        try:
            state = client.read_flow_run(flow_run_id).state
            log.tell()
            heard = time.monotonic()
        except HTTPError:  # the server may be started again meanwhile
            if time.monotonic() - heard > LOST_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        if state is not None and state.name != shown:
            shown = state.name
            say(f"the run is {shown}" + (f": {state.message}" if state.message and not state.is_final() else ""))
        if state is not None and state.is_final():
            log.tell_last()
            return state
        time.sleep(POLL_SECONDS)


class _Log:
    """The log of a run, told line by line."""

    def __init__(self, client: Any, flow_run_id: Any, say: Callable[[str], None]) -> None:
        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

        self._client, self._say, self._told, self._whole = client, say, 0, False
        self._mine = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))

    def tell(self) -> None:
        """Tell what has come since the last time."""
        from prefect.client.schemas.sorting import LogSort

        full = True
        while full:
            lines = self._client.read_logs(self._mine, limit=LOG_PAGE, offset=self._told, sort=LogSort.TIMESTAMP_ASC)
            for line in lines:
                self._say(line.message)
                self._whole = self._whole or (line.task_run_id is None and line.message.startswith("Finished in state"))
            self._told, full = self._told + len(lines), len(lines) == LOG_PAGE

    def tell_last(self) -> None:
        """Tell what comes behind the end of the run: its process sends lines in batches."""
        deadline = time.monotonic() + LATE_SECONDS
        while not self._whole and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 2)
            self.tell()
