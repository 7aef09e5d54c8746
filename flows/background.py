"""A program that runs beside a command until the command ends, and tells when it is ready.

One decision: it is followed and ended as every launched program is; only the waiting is done by a thread. It ends with
this process, however this one ends.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tasks.launch import ProgramFailed, run_program
from tasks.locks import Interrupted
from tasks.program import Spec

POLL_SECONDS = 0.1


class Background:
    """A program beside this process, within a `with`.

    Args:
        module: the module whose `main` reads the spec; it emits `ready` with a `url`.
        settings, runtime, inputs: of its spec.
        say: told its notes.
        environment: variables for it.

    Raises:
        ProgramFailed: it failed before it was ready.
    """

    url: str
    """Where it listens."""

    def __init__(
        self,
        module: str,
        settings: dict[str, Any],
        runtime: dict[str, Any],
        inputs: dict[str, str],
        say: Callable[[str], None],
        environment: Mapping[str, str],
    ) -> None:
        self.module, self.say, self.environment = module, say, environment
        self.folder = Path(tempfile.mkdtemp(prefix="llamatuner-"))
        output, scratch, events, failure = (
            str(self.folder / name) for name in ("output", "scratch", "events", "failure")
        )
        self.spec = Spec(settings, runtime, inputs, output, scratch, events, failure)
        self.stop, self.moved = threading.Event(), threading.Event()
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._follow, name=module)

    def __enter__(self) -> Background:
        self.thread.start()
        try:
            while not self.moved.wait(POLL_SECONDS):
                continue
            self.check()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def wait(self) -> None:
        """Wait until it ends.

        Raises:
            ProgramFailed: it ended by itself.
        """
        while self.thread.is_alive():
            self.thread.join(POLL_SECONDS)
        self.check()

    def check(self) -> None:
        """Raise what it failed with; a program that ended well when nobody asked it to has failed, too."""
        if self.failure is not None:
            raise self.failure
        if not self.thread.is_alive():
            raise ProgramFailed("unexpected", f"{self.module} has ended")

    def end(self) -> None:
        """End it and all it started."""
        self.stop.set()
        self.thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _follow(self) -> None:
        try:
            run_program(self.module, self.spec, self.folder, self._event, self.stop, environment=self.environment)
        except (Exception, Interrupted) as error:  # noqa: BLE001 - raised where the program is waited for
            self.failure = error
        finally:
            self.moved.set()

    def _event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "ready":
            self.url = event["url"]
            self.moved.set()
        elif event["kind"] == "note":
            self.say(event["text"])
