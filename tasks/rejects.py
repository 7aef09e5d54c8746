"""Rows left out: counted, kept, and said, or the end of the run.

One decision: rows in = rows out + rows reported, at every step; the step that leaves a row out writes it to
`report/rejected.jsonl` with its file, place and reason, and `bad_rows: fail` shows all reasons at once.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from tasks.reading import BadRow

SHOWN = 10  # problems shown in an error; the file has them all


@dataclass
class Rejects:
    """The rows one step leaves out."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file: str, place: str, row: int, bad: BadRow) -> None:
        """Note a row left out."""
        self.rows.append({"file": file, "place": place, "row": row, "reason": bad.reason, "detail": bad.detail})

    def counts(self) -> dict[str, int]:
        """Reason → rows."""
        return dict(sorted(Counter(row["reason"] for row in self.rows).items()))

    def raise_if_any(self, title: str, cure: str) -> None:
        """End the run over the rows left out.

        Raises:
            InputError: there are any; the first of them shown, the others counted.
        """
        if not self.rows:
            return
        problems = [
            Problem(f"{row['file']}, {row['place']}", f"{row['detail']} [{row['reason']}]") for row in self.rows[:SHOWN]
        ]
        more = len(self.rows) - SHOWN
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts().items())
        tail = f"and {more} more rows; in all {reasons}" if more > 0 else f"in all {reasons}"
        raise InputError([*problems, Problem("", tail, cure)], title)

    def write(self, output: Path) -> None:
        """Write `report/rejected.jsonl`, also when it is empty: an empty file says that nothing was left out."""
        path = output / "report" / "rejected.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows), encoding="utf-8")
