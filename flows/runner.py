"""A session's flow, run in this process against whatever Prefect API there is."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from queue import Empty
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from flows.session import Session

FLUSH_SECONDS = 5.0


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
    from flows.reconcile import run_tag, settle

    token, recipe = SESSION.set(session), session.pipeline.recipe
    try:
        with tags(run_tag(session.record), *labels):
            pipeline({**recipe.raw, "name": recipe.name}, return_state=True)
    except (KeyboardInterrupt, TerminationSignal):
        session.stop.set()  # a second signal, or one that met Prefect's handler: what is open is closed below
    except Exception as error:  # noqa: BLE001 - the flow's own failures come back as a state: this is Prefect's API
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


def drop_events(api: str) -> int:
    """Drop what Prefect has not told its server yet if nobody listens there any more; how many events that were.

    Prefect tries every event for a minute, one behind the other, and its process stays for as long after its end. What
    the events would have said stands in the run's record, from which the next run tells it.

    Args:
        api: address of Prefect's API. One that does not answer may be busy and is waited for, one that refuses is gone.
    """
    from prefect.events.worker import EventsWorker

    place, dropped = urlsplit(api), 0
    try:
        port = place.port or {"https": 443}.get(place.scheme, 80)
        socket.create_connection((place.hostname or "", port), timeout=1.0).close()
    except ConnectionRefusedError:
        for worker in list(EventsWorker._instances.values()):  # type: ignore[misc] # there is no public way to them
            try:
                while True:
                    worker._queue.get_nowait()
                    worker._queue.task_done()
                    dropped += 1
            except Empty:
                continue
    except OSError:
        return 0
    return dropped
