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
    texts: list[str] = field(default_factory=list)

    def add(self, file: str, place: str, row: int, bad: BadRow, text: str = "") -> None:
        """Note a row left out.

        Args:
            file, place, row: where it came from.
            bad: why.
            text: the row itself, to be kept under `bad_rows: quarantine`.
        """
        self.rows.append({"file": file, "place": place, "row": row, "reason": bad.reason, "detail": bad.detail})
        self.texts.append(text)

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

    def raise_above(self, limit: float, read: int, title: str) -> None:
        """End the run over too many rows left out.

        Args:
            limit: share of the rows read that may be left out.
            read: rows read.
            title: of the error.

        Raises:
            InputError: there are more.
        """
        share = len(self.rows) / max(1, read)
        if share <= limit:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts().items())
        count = f"{len(self.rows)} of {read} rows ({share:.0%})"
        rule = f"{count} cannot be used, more than bad_rows_limit {limit:g}: {reasons}"
        shown = [
            Problem(f"{row['file']}, {row['place']}", f"{row['detail']} [{row['reason']}]") for row in self.rows[:3]
        ]
        raise InputError([*shown, Problem("", rule, "Mend the rows, or raise bad_rows_limit.")], title)

    def write(self, output: Path, quarantine: bool = False) -> None:
        """Write `report/rejected.jsonl`, also when it is empty: an empty file says that nothing was left out.

        Args:
            output: the artifact's folder.
            quarantine: write the rows themselves as well, as they were, to `report/quarantine.jsonl`.
        """
        if quarantine:
            (output / "report").mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{text}\n" for text in self.texts)
            (output / "report" / "quarantine.jsonl").write_text(lines, encoding="utf-8")
        path = output / "report" / "rejected.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows), encoding="utf-8")
