"""Steps that a command needs by themselves, made outside a run: a download, a merge."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from rich.console import Console

from flows.view import make_view
from registry.home import Home
from tasks.artifacts import Artifact, Store
from tasks.digests import DigestMemory
from tasks.steps import Step, do, upstream


def make_steps(steps: Sequence[Step], home: Home, console: Console) -> list[Artifact]:
    """Make steps and what they need; what is there already is not made again.

    Returns:
        The artifacts of `steps`, in their order.

    Raises:
        InputError, ProgramFailed, OSError: as the functions of the steps do.
    """
    store, memory, stop, view = Store(home), DigestMemory(home.digests), threading.Event(), make_view(console)
    made: dict[int, Artifact] = {}
    try:
        for step in upstream(list(steps)):
            view.started(step)
            try:
                outcome = do(step, store, memory, stop, lambda event, step=step: view.event(step, event))  # type: ignore[misc]
            except BaseException as error:
                view.failed(step, error)
                raise
            view.ended(step, outcome)
            made[id(step)] = outcome.artifact
    finally:
        view.close()
    return [made[id(step)] for step in steps]
