"""A session's flow, run in this process against whatever Prefect API there is."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flows.prefect_server import is_own
from flows.reconcile import leave_open, run_tag, settle
from flows.run_records import RunRecord

if TYPE_CHECKING:
    from flows.session import Session

FLUSH_SECONDS = 5.0
RESTART_SECONDS = 60.0  # how long a server may be away when a run ends
GIVEN_UP = threading.Event()
"""Set when this process has nobody to report to any more."""


def import_prefect() -> None:
    """It takes as long as the server's start."""
    from flows.session import holding_signals

    with holding_signals():
        import flows.pipeline  # noqa: F401 - for the time it takes


def run_flow(session: Session, labels: Sequence[str] = ()) -> str:
    """Run the flow with this session; the status the session ended with.

    Args:
        session: of the run.
        labels: tags of the flow run, beside that of its record.
    """
    from prefect import tags
    from prefect.exceptions import TerminationSignal

    from flows.pipeline import SESSION, pipeline

    token, recipe = SESSION.set(session), session.pipeline.recipe
    try:
        with tags(run_tag(session.record), *labels):
            pipeline({**recipe.raw, "name": recipe.name}, return_state=True)
    except (KeyboardInterrupt, TerminationSignal):
        session.stop.set()  # a second signal, or one that met Prefect's handler: what is open is closed below
    except Exception as error:  # noqa: BLE001 - the flow's own failures come back as a state: this is Prefect's API
        if not GIVEN_UP.is_set():
            session.failed.setdefault("prefect", error)
    finally:
        SESSION.reset(token)
        settle(session.record, session.view.say)
        if session.record.values["status"] == "running":  # Prefect itself failed before the flow's body ran
            session.finish()
    return str(session.record.values["status"])


def flush_events() -> None:
    """Send what Prefect has not told its server yet: a process that outlives its server would say that it could not."""
    from prefect.events.worker import EventsWorker

    EventsWorker.drain_all(FLUSH_SECONDS)


def server_is_gone(api: str, stop: threading.Event) -> bool:
    """Whether nobody has listened at an address for `RESTART_SECONDS`; a server that is slow, or far away, is not gone.

    Args:
        api: address of Prefect's API.
        stop: when set, one refusal is enough.
    """
    place, deadline = urlsplit(api), time.monotonic() + RESTART_SECONDS
    port = place.port or {"https": 443}.get(place.scheme, 80)
    while True:
        try:
            socket.create_connection((place.hostname or "", port), timeout=1.0).close()
        except ConnectionRefusedError:
            if is_own(api) or stop.wait(1.0) or time.monotonic() > deadline:  # nobody starts the run's own again
                return True
        except OSError:
            return False
        else:
            return False


def give_up_server(record: RunRecord, say: Callable[[str], None]) -> None:
    """Tell nothing more to a server that is gone; the next run tells it how this one ended.

    Prefect tries every call and every batch of log lines for a minute, one behind the other. From here on it tries
    once, in all threads: they share these settings.
    """
    from prefect.settings import get_current_settings

    say("Prefect's server is gone; the next run tells it how this one ended")
    leave_open(record, say)
    get_current_settings().client.max_retries = 0
    GIVEN_UP.set()


def leave(code: int) -> None:
    """End this process at once if its server was given up.

    Prefect would first try for ten seconds to send each of its events, of which a run has dozens.

    Args:
        code: exit code.
    """
    if GIVEN_UP.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
