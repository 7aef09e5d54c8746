"""The rows that ship: each once, and what is measured on is never trained on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from registry.data_registry import find_dataset

PAIRS = ("assistant_preferences", "assistant_preferences_held_out")


def rows(name: str) -> list[dict[str, Any]]:
    (path,) = find_dataset(name, None, name).files
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(name: str) -> list[str]:
    """What users ask, alike where only case and white space differ; the first turn of a conversation."""
    asked = [row["instruction"] + " " + row.get("input", "") for row in rows(name)]
    return [" ".join(question.lower().split()) for question in asked]


def asked_in_conversations() -> set[str]:
    turns = (turn for row in rows("assistant_chat") for turn in row["messages"] if turn["role"] == "user")
    return {" ".join(turn["content"].lower().split()) for turn in turns}


@pytest.mark.parametrize(("name", "count", "chinese"), [(PAIRS[0], 124, 24), (PAIRS[1], 24, 5)])
def test_preferences_are_in_two_languages_with_a_better_and_a_worse_answer(name: str, count: int, chinese: int) -> None:
    found = rows(name)
    assert len(found) == count
    assert sum(any("\u4e00" <= letter <= "\u9fff" for letter in row["instruction"]) for row in found) == chinese
    for row in found:
        assert sorted(row) == ["chosen", "instruction", "rejected"]
        assert all(text and text == text.strip() for text in row.values())
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize("name", ["assistant", "assistant_held_out", *PAIRS])
def test_no_question_is_asked_twice(name: str) -> None:
    assert len(set(questions(name))) == len(questions(name))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_no_answer_of_a_preference_is_given_twice(side: str) -> None:
    answers = [row[side] for name in PAIRS for row in rows(name)]
    assert len(set(answers)) == len(answers)


def test_no_held_out_question_is_trained_on() -> None:
    trained = {*questions("assistant"), *questions(PAIRS[0]), *asked_in_conversations()}
    held_out = {*questions("assistant_held_out"), *questions(PAIRS[1])}
    assert trained & held_out == set()
