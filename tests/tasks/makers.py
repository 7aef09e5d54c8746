"""Makers of chunks for tests of the workers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from tasks.chunks import Report, Task


class Echo:
    """Writes its payload and setting; says who made it; can wait, and can refuse."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def __call__(self, task: Task, payload: bytes, target: Path) -> Report:
        if "refuse" in task:
            raise InputError(
                [Problem("a.jsonl, line 3", f"not {task['refuse']}", "Mend it."), Problem("b", "c")], "data"
            )
        if "fail" in task:
            raise ZeroDivisionError(task["fail"])
        if "started" in task:
            Path(task["started"]).write_text(str(os.getpid()))
        time.sleep(task.get("seconds", 0))
        print("noise on standard output", flush=True)
        target.write_bytes(payload * task.get("times", 1) + str(self.settings["mark"]).encode())
        return {"pid": os.getpid(), "letter": "é🙂"}
