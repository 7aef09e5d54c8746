"""What runs there were: one small JSON file per pipeline run.

One decision: a record carries the process id and start time of its run, so that the next start can tell a run that
is going on from one that died without a word, and close the latter everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import psutil

from registry.home import Home

RUNNING = "running"


class RunRecord:
    """The record of one run; every change is written at once, whole."""

    def __init__(self, home: Home, values: dict[str, Any]) -> None:
        self._home, self.values = home, values

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
            "pid_started": psutil.Process().create_time(),
        }
        record = cls(home, values)
        record.update()
        return record

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

    def died(self) -> bool:
        """Whether its process is gone though the record says running."""
        if self.values["status"] != RUNNING:
            return False
        try:
            return abs(psutil.Process(self.values["pid"]).create_time() - self.values["pid_started"]) > 1.0
        except psutil.NoSuchProcess:
            return True


def records(home: Home) -> Iterator[RunRecord]:
    """All records, newest first; one that cannot be read is passed over only when it is half-written (`.part`)."""
    for path in sorted(home.runs.glob("*.json"), reverse=True):
        yield RunRecord(home, json.loads(path.read_text(encoding="utf-8")))


def last_with_keys(home: Home, keys: list[str | None]) -> RunRecord | None:
    """The newest completed run that ended with exactly these artifacts."""
    for record in records(home):
        if record.values["status"] == "completed" and [s["key"] for s in record.values.get("steps", [])] == keys:
            return record
    return None
