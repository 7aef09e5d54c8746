"""The lock of a key among machines that share a store: a slot of a concurrency limit on Prefect's server.

One decision: the slot is lent for a minute and the loan renewed, so that a machine that dies gives it back. To lose it
costs time and nothing else: two machines may then make the same, each whole. So no trouble here ends a run.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tasks.artifacts import Across, on_this_machine
from tasks.locks import check_stop

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

NAME = "llamatuner-"  # what the limits of locks begin with
LEASE_SECONDS = 60.0  # the least that Prefect lends for
RENEW_SECONDS = 20.0
POLL_SECONDS = 1.0
TAKEN = 423
UNUSED = timedelta(days=1)  # a limit that nobody took for so long is removed
PAGE = 200  # limits asked for at once; the most that Prefect gives

Say = Callable[[str], None]


def across_machines() -> Across:
    """The lock of the server in PREFECT_API_URL; none where that is not set, or this run has the server to itself."""
    from flows.prefect_server import is_own

    url = os.environ.get("PREFECT_API_URL")
    return server_lock if url and not is_own(url) else on_this_machine


@contextmanager
def server_lock(key: str, stop: threading.Event, say: Say) -> Iterator[None]:
    """Hold the lock of a key for the body, on whatever machine.

    Args:
        key: of a step.
        stop: ends the wait.
        say: told that it waits, and what does not work.

    Raises:
        Interrupted: `stop` was set while waiting.
    """
    from prefect.client.orchestration import get_client

    name, done = f"{NAME}{key[:32]}", threading.Event()
    with get_client(sync_client=True) as client:
        lease = _acquire(client, name, stop, say)
        if lease:  # Prefect's settings, the server's address among them, go by context
            renew = partial(copy_context().run, _renew, lease, done, say)
            threading.Thread(target=renew, name=f"lease-{key[:12]}", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            if lease:
                _release(client, lease, say)


def _acquire(client: SyncPrefectClient, name: str, stop: threading.Event, say: Say) -> UUID | None:
    """Wait for the slot; its loan, or None where the server cannot lend."""
    said = False
    while True:
        check_stop(stop)
        try:
            lease = _ask(client, name)
        except Exception as error:  # noqa: BLE001 - whatever the client raises: the step is made without the lock
            say(f"no lock among machines, another one may make the same ({type(error).__name__}: {error})")
            return None
        if lease:
            return lease
        if not said:
            say(f"waiting for another machine, which is at it (limit {name} on Prefect's server)")
            said = True
        stop.wait(POLL_SECONDS)


def _ask(client: SyncPrefectClient, name: str) -> UUID | None:
    """The loan of the slot; None while somebody has it."""
    from httpx import HTTPStatusError
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists

    try:
        given = client.increment_concurrency_slots_with_lease([name], 1, "concurrency", LEASE_SECONDS).json()
    except HTTPStatusError as error:
        if error.response.status_code == TAKEN:
            return None
        raise
    if given["limits"]:
        return UUID(given["lease_id"])
    _remove_unused(client)
    try:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    except ObjectAlreadyExists:  # by another machine, just now
        return None
    return _ask(client, name)


def _remove_unused(client: SyncPrefectClient) -> None:
    """Remove limits of locks that nobody has and nobody has asked for since long ago."""
    from prefect.types._datetime import now

    found: list[Any] = client.read_global_concurrency_limits(limit=PAGE)
    for limit in found:
        idle = limit.updated is not None and now("UTC") - limit.updated > UNUSED
        if limit.name.startswith(NAME) and not limit.active_slots and idle:
            client.delete_global_concurrency_limit_by_name(limit.name)


def _renew(lease: UUID, done: threading.Event, say: Say) -> None:
    """Renew the loan until the body has ended, with a client of this thread's own."""
    from prefect.client.orchestration import get_client

    renewed = time.monotonic()
    with get_client(sync_client=True) as client:
        while not done.wait(RENEW_SECONDS):
            try:
                client.renew_concurrency_lease(lease, LEASE_SECONDS)
                renewed = time.monotonic()
            except Exception as error:  # noqa: BLE001 - tried again until the loan is over
                if time.monotonic() - renewed > LEASE_SECONDS:
                    say(f"the lock among machines is lost, another one may make the same ({type(error).__name__})")
                    return


def _release(client: SyncPrefectClient, lease: UUID, say: Say) -> None:
    try:
        client.release_concurrency_slots_with_lease(lease)
    except Exception as error:  # noqa: BLE001 - what was made is there; the loan ends by itself
        say(f"the lock among machines could not be given back and ends within a minute ({type(error).__name__})")
