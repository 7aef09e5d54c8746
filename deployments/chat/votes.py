"""Votes between answers, as rows that stages of pairs read.

One decision: a vote is a pair only where both models answered the very same conversation; so it is written when it is
given, with the messages that both have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.jsonlines import append_json_line

Message = Mapping[str, Any]


def vote_rows(
    talks: Sequence[Sequence[Message]], models: Sequence[str], best: int, system: str
) -> list[dict[str, Any]]:
    """The better answer against each worse one; none for answers that say the same.

    >>> talks = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}] for said in ("Hey", "No")]
    >>> [(row["chosen"], row["rejected_model"]) for row in vote_rows(talks, ["a", "b"], 0, "")]
    [([{'role': 'assistant', 'content': 'Hey'}], 'b')]

    Args:
        talks: what was said with each model, its answer last.
        models: their names.
        best: whose answer is the best one.
        system: system message; may be empty.

    Raises:
        ValueError: the conversations before the answers differ.
    """
    prompts = [[dict(message) for message in talk[:-1]] for talk in talks]
    if any(prompt != prompts[best] for prompt in prompts):
        raise ValueError("the models have not been asked the same")
    answers = [dict(talk[-1]) for talk in talks]
    head = [{"role": "system", "content": system}] if system else []
    return [
        {
            "prompt": head + prompts[best],
            "chosen": [answers[best]],
            "rejected": [answer],
            "chosen_model": models[best],
            "rejected_model": model,
            "voted": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        for answer, model in zip(answers, models, strict=True)
        if answer != answers[best]
    ]


def keep(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Add rows to a file; how many it has then.

    Raises:
        OSError: it cannot be written.
    """
    return [append_json_line(path, row) for row in rows][-1] if rows else count(path)


def count(path: Path) -> int:
    """Rows of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
