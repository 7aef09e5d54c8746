"""What MLflow could not be told yet, in a file of the home.

One decision: entries are kept only from the moment MLflow cannot be reached until it has all of them, so that a run
with a healthy server writes nothing twice. The order is kept: nothing overtakes what waits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

from registry.home import Home
from tasks.locks import locked, try_lock
from tasks.mlflow_entries import Connection, Entry, tell, unreachable

WAITING = "waiting-"
"""Begins the id of a run that MLflow has not heard of."""
KNOWN = "known"
"""The first entry of a journal: which server it is for, and which ids that gave to such runs."""


class Journal:
    """The entries of one run that wait; held by its process as long as it lives."""

    def __init__(self, home: Home, path: Path) -> None:
        self._path = path
        self._lock = _lock(home, path)
        self._held = ExitStack()

    @classmethod
    def begin(cls, home: Home, uri: str | None) -> Journal:
        """An empty one.

        Args:
            home: where it is kept.
            uri: of a server that somebody named; None for the home's own, wherever that will be.
        """
        journal = cls(home, home.mlflow / "journal" / f"{uuid4().hex}.jsonl")
        journal._path.parent.mkdir(parents=True, exist_ok=True)
        journal._held.enter_context(locked(journal._lock))
        journal.add(_beginning(uri))
        return journal

    @property
    def uri(self) -> str | None:
        """Of the server that it is meant for, where somebody named one."""
        uri: str | None = self.entries()[0]["uri"]
        return uri

    def add(self, entry: Entry) -> None:
        """Keep an entry behind the others."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def entries(self) -> list[Entry]:
        """All, the first one first; without the half of one that a killed process, or a full disk, left at the end."""
        lines = self._path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines[:-1] if line] or [_beginning(None)]

    def deliver(self, to: Connection, refused: Callable[[Entry, Exception], None]) -> dict[str, str]:
        """Tell all that waits, and remove the file.

        Args:
            to: where.
            refused: told what MLflow will never take.

        Returns:
            The ids that MLflow gave to runs it had not heard of.

        Raises:
            What makes MLflow unreachable; what is told by then waits no more.
        """
        first, *waiting = self.entries()
        ids: dict[str, str] = first["ids"]
        for place, entry in enumerate(waiting):
            try:
                found = tell(to, named(entry, ids))
            except Exception as error:
                if unreachable(error):
                    self._keep([first, *waiting[place:]])
                    raise
                refused(entry, error)
            else:
                if entry["do"] == "open":
                    ids[entry["run"]] = found
        self.close()
        return ids

    def _keep(self, entries: list[Entry]) -> None:
        temporary = self._path.with_suffix(".part")
        temporary.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in entries), encoding="utf-8")
        os.replace(temporary, self._path)

    def leave(self) -> None:
        """Leave it to the next run."""
        self._held.close()

    def close(self) -> None:
        """Forget it."""
        self._path.unlink(missing_ok=True)
        self._lock.unlink(missing_ok=True)
        self._held.close()


def _beginning(uri: str | None) -> Entry:
    return {"do": KNOWN, "uri": uri, "ids": {}}


def named(entry: Entry, ids: dict[str, str]) -> Entry:
    """An entry with the ids that MLflow knows."""
    known = {name: ids.get(entry[name], entry[name]) for name in ("run", "parent") if entry.get(name)}
    return entry | known | ({"again": True} if entry["do"] == "open" else {})


def _lock(home: Home, path: Path) -> Path:
    return home.locks / f"mlflow-{path.stem}.lock"


def left_behind(home: Home) -> Iterator[Journal]:
    """Journals of processes that have ended, the oldest first, each held while it is looked at."""
    for path in sorted((home.mlflow / "journal").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        journal = Journal(home, path)
        with try_lock(journal._lock) as free:
            if free and path.exists():
                yield journal
