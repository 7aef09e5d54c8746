"""A comparison kept where teams look: as a run of MLflow, and on Prefect's pages."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from flows.comparison import Measured, Side
from flows.comparison_page import letter
from registry.home import Home
from tasks.tracking import Tracker

COMPARED_TAG = "llamatuner.compared"
PREFECT = "PREFECT_API_URL"


def keep_comparison(
    sides: Sequence[Side],
    numbers: Sequence[Measured],
    page: str,
    answer: dict[str, Any],
    home: Home,
    say: Callable[[str], None],
) -> str | None:
    """Keep a comparison; the id of its MLflow run, None where MLflow did not take it.

    Args:
        sides, numbers: what was compared, and what came of it.
        page: for a browser.
        answer: for programs.
        home: whose MLflow it is, where no other is named.
        say: told where it is kept, and what did not work.
    """
    names = ", ".join(f"{side.run} {side.stage}".strip() for side in sides)
    tracker = Tracker(home, say)
    tracker.start(f"comparison: {names}", {COMPARED_TAG: ",".join(side.run for side in sides)}, {"compare": names})
    tracker.content(tracker.run_id, page.encode, "comparison.html")
    tracker.dictionary(tracker.run_id, answer, "comparison.json")
    values = {f"{row.metric}/{letter(n)}": each["value"] for row in numbers for n, each in _there(row.results)}
    values |= {
        f"{row.metric}/{letter(n)}-A{end}": each[name]
        for row in numbers
        for n, each in _there(row.differences)
        for end, name in (("", "value"), (".low", "low"), (".high", "high"))
        if name in each
    }
    tracker.results(tracker.run_id, values)
    tracker.close_all("FINISHED")
    kept = tracker.root
    if kept:
        say(f"kept in MLflow: comparison.html of run {kept}")
    if os.environ.get(PREFECT):
        from prefect.artifacts import create_markdown_artifact

        create_markdown_artifact(comparison_text(sides, numbers), key="comparison", description=f"Comparison: {names}")
        say("kept on Prefect's pages: artifact comparison")
    return kept


def _there(values: Sequence[dict[str, Any] | None]) -> list[tuple[int, dict[str, Any]]]:
    return [(number, value) for number, value in enumerate(values) if value is not None]


def comparison_text(sides: Sequence[Side], numbers: Sequence[Measured]) -> str:
    """The numbers as Markdown."""
    letters = [letter(number) for number in range(len(sides))]
    lines = [f"* {name}: {side.run} {side.stage}" for name, side in zip(letters, sides, strict=True)]
    lines += ["", f"| metric | rows | {' | '.join(letters)} |", f"| --- | --- |{' --- |' * len(sides)}"]
    for row in numbers:
        cells = []
        for result, away in zip(row.results, row.differences, strict=True):
            text = f"{result['value']:.4g}{_between(result, '.4g')}" if result else "–"
            if away:
                what = "differs" if away["real"] else "may be chance"
                text += f"; {away['value']:+.3g}{_between(away, '+.3g')}, {what}"
            cells.append(text)
        lines.append(f"| {row.metric} | {row.rows} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "In brackets 95 % intervals; a difference is that to A, of paired rows."])


def _between(number: dict[str, Any], form: str) -> str:
    return f" ({number['low']:{form}} to {number['high']:{form}})" if "low" in number else ""
