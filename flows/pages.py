"""A run outlives whoever watches it: Prefect's API that cannot be reached, a worker that is gone.

One decision: Prefect's pages are written behind the run's back, by a thread of their own. Asking an API that is away
takes Prefect's client a minute, in which a run would hear neither its programs nor a request to stop.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any

from httpx import HTTPError
from prefect.exceptions import CancelledRun, FailedRun, UnfinishedRun
from prefect.logging.handlers import PrefectConsoleHandler

PAUSE = 30.0  # seconds in which pages are left out when one could not be written
LAST_SECONDS = 10.0  # for the pages that wait at the end of a run


class Pages:
    """Writes pages, one after the other.

    Args:
        say: told once when they cannot be written.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._away_until, self._said = say, 0.0, False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pages")
        self._waiting: list[Future[None]] = []

    def write(self, page: Callable[..., None], *given: Any) -> None:
        """Have a page written for the flow or task run of this moment.

        Args:
            page: a function of `flows.prefect_pages`.
            given: its arguments.
        """
        self._waiting = [each for each in self._waiting if not each.done() or each.exception()]
        self._waiting.append(self._thread.submit(copy_context().run, self._write, page, *given))

    def _write(self, page: Callable[..., None], *given: Any) -> None:
        if time.monotonic() < self._away_until:
            return
        try:
            page(*given)
        except HTTPError as error:
            self._away_until = time.monotonic() + PAUSE
            if not self._said:
                self._said = True
                self._say(
                    f"Prefect cannot be reached: {type(error).__name__}: {error}. The run goes on without its pages."
                )

    def finish(self) -> None:
        """Wait a little for what is not written yet.

        Raises:
            Whatever a page's own fault was.
        """
        done, _ = wait(self._waiting, LAST_SECONDS)
        self._thread.shutdown(wait=False, cancel_futures=True)
        for each in done:
            each.result()


def outlive_reader() -> None:
    """Go on when nobody reads this process's output any more, as when its worker is killed.

    Prefect prints with rich, which ends the process at the first line that it cannot print.
    """
    names = [None, *logging.Logger.manager.loggerDict]
    for handler in {handler for name in names for handler in logging.getLogger(name).handlers}:
        if isinstance(handler, PrefectConsoleHandler):
            handler.console.on_broken_pipe = _print_nowhere  # type: ignore[method-assign]


def end_without_traceback() -> None:
    """Keep Prefect's traceback out of the log of a run that ends otherwise than completed: why is said already."""
    for name in ("prefect.flow_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_is_no_echo)


def _is_no_echo(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    # the state that the flow has ended in, or that somebody else has put it into, raised by Prefect to itself
    return not isinstance(error, CancelledRun | FailedRun | UnfinishedRun)


def _print_nowhere() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
