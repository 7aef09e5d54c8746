"""add_tokens: base + tokens → a base whose tokenizer, embedding and output head know them.

One decision: it is a step ahead of everything else of its stage. So data, training, merge and evaluation see one model
with a larger vocabulary, as if it had been published so; no other step knows that tokens were added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tasks.steps import Input, Step, Work
from tasks.training import BASE_FILES, keep_log

VOCABULARY_VERSION = 1  # first form
REPORT = "added_tokens_report.json"


def add_tokens_step(stage: str, label: str, base: Input, tokens: Sequence[str], special: Sequence[str]) -> Step:
    """The step that adds tokens to a base.

    Args:
        stage: that they are added for.
        label: its name for people.
        base: the model.
        tokens: text that becomes one token wherever it stands.
        special: control tokens.
    """
    return Step(
        stage=stage,
        name="add_tokens",
        version=VOCABULARY_VERSION,
        label=label,
        identity={"add_tokens": list(tokens), "add_special_tokens": list(special)},
        inputs={"base": Input(base.source, BASE_FILES)},
        run="tasks.vocabulary:add_tokens",
        devices=1,
    )


def add_tokens(work: Work) -> dict[str, Any]:
    """Launch the program."""
    work.run("tasks.vocabulary_program")
    keep_log(work)
    found: dict[str, Any] = json.loads((work.output / REPORT).read_text(encoding="utf-8"))
    return {"added": len(found["ids"]), "vocabulary": found["vocabulary"]}
