"""What runs there were: one small JSON file per pipeline run.

One decision: a run holds a lock as long as it lives, so that the next start can tell a run that is going on from one
that died without a word, and close the latter everywhere. Process ids cannot tell: they are used again, and each
container counts its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from registry.errors import InputError, Problem
from registry.home import Home
from tasks.locks import locked, try_lock

RUNNING = "running"


class RunRecord:
    """The record of one run; every change is written at once, whole."""

    def __init__(self, home: Home, values: dict[str, Any]) -> None:
        self._home, self.values = home, values
        self._alive = ExitStack()

    @classmethod
    def start(cls, home: Home, recipe: str) -> RunRecord:
        """A record of a run that begins now, in this process."""
        now = datetime.now(UTC)
        values = {
            "id": f"{now:%Y%m%d-%H%M%S}-{uuid4().hex[:6]}",
            "recipe": recipe,
            "status": RUNNING,
            "started": now.isoformat(timespec="seconds"),
            "pid": os.getpid(),
        }
        record = cls(home, values)
        record._alive.enter_context(locked(record._lock))
        record.update()
        return record

    @property
    def _lock(self) -> Path:
        return self._home.locks / f"run-{self.values['id']}.lock"

    def update(self, **fields: Any) -> None:
        """Set fields and write the record."""
        self.values |= fields
        self._home.runs.mkdir(parents=True, exist_ok=True)
        path = self._home.runs / f"{self.values['id']}.json"
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(self.values, ensure_ascii=False, indent=1), encoding="utf-8")
        temporary.rename(path)

    def end(self, status: str, **fields: Any) -> None:
        """Close the record."""
        self.update(status=status, ended=datetime.now(UTC).isoformat(timespec="seconds"), **fields)
        self._lock.unlink(missing_ok=True)
        self._alive.close()

    def died(self) -> bool:
        """Whether its process is gone though the record says running."""
        if self.values["status"] != RUNNING:
            return False
        with try_lock(self._lock) as free:
            return free


def unclosed(record: RunRecord) -> bool:
    """Whether a run died without a word, or ended and could not close what it had opened."""
    return record.died() or bool(record.values.get("left_open"))


def records(home: Home) -> Iterator[RunRecord]:
    """All records, newest first; one that cannot be read is passed over only when it is half-written (`.part`).

    Raises:
        InputError: a record is damaged.
    """
    for path in sorted(home.runs.glob("*.json"), reverse=True):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(Problem(str(path), f"a damaged record of a run: {error}", "Remove the file.")) from error
        yield RunRecord(home, values)


def last_with_keys(home: Home, keys: list[str | None]) -> RunRecord | None:
    """The newest completed run that ended with exactly these artifacts."""
    for record in records(home):
        if record.values["status"] == "completed" and [s["key"] for s in record.values.get("steps", [])] == keys:
            return record
    return None
