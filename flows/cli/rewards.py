"""What a reward model's results look like on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROWS = {
    "reward_accuracy": "all pairs",
    "reward_accuracy_chosen_shorter": "preferred answer is shorter",
    "reward_accuracy_similar_length": "about the same length",
    "reward_accuracy_chosen_longer": "preferred answer is longer",
    "longer_is_better_accuracy": "the rule “the longer is better”",
}


def print_rewards(console: Console, title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """How often a reward model is right, by the lengths of the answers; of answers without pairs, their scores only.

    Args:
        console: to print to.
        title: whose results they are.
        results: of one data set, as `tasks.rewards` gives them.
    """
    if "reward_accuracy" in results:
        table = Table(box=None, pad_edge=False)
        table.add_column(Text(title), no_wrap=True)
        for name in ("right", "pairs", "mean margin"):
            table.add_column(name, justify="right")
        for metric, words in ROWS.items():
            found = results.get(metric)
            if found is None:
                table.add_row(words, "", "0", "")
                continue
            margin = results.get(metric.replace("accuracy", "margin"))
            shown = f"{margin['value']:+.3f}" if margin else ""
            table.add_row(words, f"{found['value']:.1%}", f"{found['rows']:,}", shown)
        console.print(table)
        error = results["reward_calibration_error"]["value"]
        ties = results["reward_accuracy"]["ties"]
        equal = f"; {ties:,} with equal scores, which are not right" if ties else ""
        console.print(Text(f"calibration error {error:.3f}{equal}"))
    scores = results["reward_score"]
    console.print(
        Text(f"scores: mean {scores['value']:.3f}, lowest {scores['lowest']:.3f}, highest {scores['highest']:.3f}\n")
    )
