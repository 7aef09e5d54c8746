"""The rows that ship: each once, and what is measured on is never trained on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from registry.data_registry import find_dataset
from tasks.formats import converter, declared

PAIRS = ("assistant_preferences", "assistant_preferences_held_out")
PROMPTS = ("assistant_prompts", "assistant_prompts_held_out")
CHINESE = re.compile("[\u4e00-\u9fff]")


def rows(name: str) -> list[dict[str, Any]]:
    (path,) = find_dataset(name, None, name).files
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(name: str) -> list[str]:
    """What users ask, alike where only case and white space differ; the first turn of a conversation."""
    asked = [row.get("prompt") or row["instruction"] + " " + row.get("input", "") for row in rows(name)]
    return [" ".join(question.lower().split()) for question in asked]


def asked_in_conversations() -> set[str]:
    turns = (turn for row in rows("assistant_chat") for turn in row["messages"] if turn["role"] == "user")
    return {" ".join(turn["content"].lower().split()) for turn in turns}


@pytest.mark.parametrize(("name", "count", "chinese"), [(PAIRS[0], 230, 42), (PAIRS[1], 24, 5)])
def test_preferences_are_in_two_languages_with_a_better_and_a_worse_answer(name: str, count: int, chinese: int) -> None:
    found = rows(name)
    assert len(found) == count
    assert sum(bool(CHINESE.search(row["instruction"])) for row in found) == chinese
    for row in found:
        assert sorted(row) == ["chosen", "instruction", "rejected"]
        assert all(text and text == text.strip() for text in row.values())
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize("name", ["assistant", "assistant_held_out", *PAIRS, *PROMPTS])
def test_no_question_is_asked_twice(name: str) -> None:
    assert len(set(questions(name))) == len(questions(name))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_no_answer_of_a_preference_is_given_twice(side: str) -> None:
    answers = [row[side] for name in PAIRS for row in rows(name)]
    assert len(set(answers)) == len(answers)


def test_longer_is_better_is_right_for_half_of_the_preferences() -> None:
    """Else a reward model would learn lengths."""
    longer = [len(row["chosen"]) - len(row["rejected"]) for row in rows(PAIRS[0])]
    assert [sum(letters > 0 for letters in longer), sum(letters < 0 for letters in longer)] == [114, 112]


@pytest.mark.parametrize(("name", "count", "chinese"), [(PROMPTS[0], 162, 22), (PROMPTS[1], 24, 4)])
def test_prompts_are_questions_without_answers_in_two_languages(name: str, count: int, chinese: int) -> None:
    source, found = find_dataset(name, None, name), rows(name)
    form = declared(str(source.formatting), source.ranking, source.columns, source.tags, "prompt")
    convert = converter(form, "prompt")
    assert len(found) == count
    assert sum(bool(CHINESE.search(row["prompt"])) for row in found) == chinese
    for row in found:
        assert list(row) == ["prompt"]
        asked = [{"role": "user", "content": row["prompt"]}]
        assert convert(row) == [{"prompt": asked, "tools": None, "reference": None}]


def test_text_is_paragraphs_of_60_to_150_words_each_once() -> None:
    texts = [row["text"] for row in rows("assistant_text")]
    assert len(set(texts)) == len(texts) == 36
    assert all(60 <= len(text.split()) <= 150 for text in texts)


def test_no_held_out_question_is_trained_on() -> None:
    trained = {*questions("assistant"), *questions(PAIRS[0]), *questions(PROMPTS[0]), *asked_in_conversations()}
    held_out = {*questions("assistant_held_out"), *questions(PAIRS[1]), *questions(PROMPTS[1])}
    assert trained & held_out == set()
