"""Whatever a row holds, a converter gives rows that keep every rule of their shape, or a bad row; it never breaks."""

from __future__ import annotations

import datetime
import json
import random
from typing import Any

import pytest

from tasks.formats import FORMATTINGS, SHAPES, Form, converter, declared, detect, misfit
from tasks.reading import BadRow
from tests.tasks.raw_rows import Row
from tests.tasks.test_formats import CHATS
from tests.tasks.test_formats_shapes import LABELLED, PAIRS, PROMPTS

GOOD_ROWS = [row for rows in (CHATS, PAIRS, LABELLED, PROMPTS) for row, _ in rows.values()]
ODD: list[Any] = [None, True, 0, 2.5, float("nan"), "", "x", " ", "{", '{"name": "f"}', "\n\nHuman: a\n\nAssistant: b"]
ODD += [[], {}, [1], ["a", "b"], [None], [[]], [{}], {"role": "user"}, b"x", datetime.date(2020, 1, 1), "\ud800"]
ODD += [[{"role": "user", "content": "x"}], [["a", "b"]], [{"rank": 1}], [{"type": ["text"]}], (1, 2), {1: 2}]
KEYS = ("role", "content", "tool_calls", "label", "weight", "name", "text", "system", "tools", "instances", "images", 5)
ENTRIES: list[Row] = [{}, {"prompt": "prompt", "response": "completion"}, {"chosen": "chosen", "rejected": "rejected"}]
FIELDS = {
    "text": {"text"},
    "chat": {"messages", "tools"},
    "preference": {"prompt", "chosen", "rejected", "tools", "margin"},
    "labelled": {"prompt", "completion", "tools", "label"},
    "prompt": {"prompt", "tools", "reference"},
}
ENDS = {"prompt": ("user", "tool")}


def spoiled(value: Any, choose: random.Random) -> Any:
    """A value with parts of it left out, put in or put in the place of others."""
    if choose.random() < 0.1:
        return choose.choice(ODD)
    if isinstance(value, dict):
        kept = {key: spoiled(part, choose) for key, part in value.items() if choose.random() > 0.05}
        return kept | ({choose.choice(KEYS): choose.choice(ODD)} if choose.random() < 0.1 else {})
    if isinstance(value, list):
        return [spoiled(part, choose) for part in value] + [choose.choice(ODD)] * (choose.random() < 0.1)
    return value


def check(row: Row, shape: str) -> None:
    """A canonical row keeps the rules of its shape."""
    assert set(row) == FIELDS[shape]
    for name, value in row.items():
        if name in ("messages", "prompt", "chosen", "rejected", "completion"):
            assert value[-1]["role"] in ENDS.get(name, ("assistant",))
            for message in value:
                assert message["role"] in ("system", "user", "assistant", "tool")
                assert message["content"] is not None or "tool_calls" in message
                for text in message.values():
                    assert text is None or text.encode() is not None
        elif name == "tools":
            assert value is None or isinstance(json.loads(value), list)
        else:
            kinds = {"label": bool, "margin": float | None, "reference": str | None, "text": str}
            assert isinstance(value, kinds[name])
    if shape == "preference":
        assert row["chosen"] != row["rejected"]
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"


@pytest.mark.parametrize("seed", range(3))
def test_spoiled_rows_are_converted_or_refused(seed: int) -> None:
    choose = random.Random(seed)
    forms = [
        declared(name, ranking, columns, {}, shape)
        for name in FORMATTINGS
        for ranking in (False, True)
        for columns in ENTRIES
        for shape in SHAPES
    ]
    converted = refused = 0
    for _ in range(700):
        good = choose.choice(GOOD_ROWS)
        row = {key: spoiled(value, choose) for key, value in good.items()}
        for shape in SHAPES:
            found: list[Form | None] = [detect(row, shape), detect(good, shape), choose.choice(forms)]
            for form in found:
                if form is None or misfit(form, shape) is not None:
                    continue
                made = converter(form, shape)(row)
                if isinstance(made, BadRow):
                    assert made.detail
                    refused += 1
                    continue
                assert made
                for canonical in made:
                    check(canonical, shape)
                converted += 1
    assert converted > 1000
    assert refused > 1000
