"""Raw rows become preference, labelled, prompt and text rows, literally these."""

from __future__ import annotations

import pytest

from tasks.formats import declared
from tests.tasks.raw_rows import GOOD, HUMAN, PAIR, SYSTEM, Row, answer, chat, gpt, rows, say

PAIRS: dict[str, tuple[Row, list[Row]]] = {
    "alpaca": ({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, [PAIR]),
    "old alpaca": ({"instruction": "a", "input": "", "output": ["b", "c"]}, [PAIR]),
    "orca": (
        {"system": "Be brief", "question": "a", "chosen": "b", "rejected": "c"},
        [PAIR | {"prompt": [*SYSTEM, *say("a")]}],
    ),
    "history": (
        {"instruction": "a", "chosen": "b", "rejected": "c", "history": [["hi", "hello"]]},
        [PAIR | {"prompt": say("hi", "hello", "a")}],
    ),
    "sharegpt": ({"conversations": gpt("a"), "chosen": gpt("", "b")[1], "rejected": gpt("", "c")[1]}, [PAIR]),
    "texts that answer turns": ({"messages": say("a"), "chosen": "b", "rejected": "c"}, [PAIR]),
    "whole conversations": (
        {"chosen": say("q", "r", "a", "b"), "rejected": say("q", "r", "a", "c")},
        [PAIR | {"prompt": say("q", "r", "a")}],
    ),
    "ultrafeedback": (
        {
            "prompt": "a",
            "prompt_id": "x",
            "chosen": say("a", "b"),
            "rejected": say("a", "c"),
            "messages": say("a", "b"),
            "score_chosen": 9.0,
            "score_rejected": 5.0,
        },
        [PAIR],
    ),
    "prompt text, answers as turns": ({"prompt": "a", "chosen": answer("b"), "rejected": answer("c")}, [PAIR]),
    "all as turns": ({"prompt": say("a"), "chosen": answer("b"), "rejected": answer("c")}, [PAIR]),
    "hh-rlhf": (
        {"chosen": HUMAN + "b", "rejected": HUMAN + " c"},
        [PAIR | {"prompt": say("hi", "hello", "more")}],
    ),
    "parting at a tool result": (
        {
            "chosen": [*say("a", "b"), {"role": "tool", "content": "1"}, *answer("d")],
            "rejected": [*say("a", "b"), {"role": "tool", "content": "2"}, *answer("d")],
        },
        [
            PAIR
            | {
                "chosen": [*answer("b"), {"role": "tool", "content": "1"}, *answer("d")],
                "rejected": [*answer("b"), {"role": "tool", "content": "2"}, *answer("d")],
            }
        ],
    ),
    "several rejected": (
        {"prompt": "a", "chosen": "b", "rejected": ["c", "d"]},
        [PAIR, PAIR | {"rejected": answer("d")}],
    ),
    "several rejected as turns": (
        {"prompt": say("a"), "chosen": answer("b"), "rejected": [answer("c"), answer("d")]},
        [PAIR, PAIR | {"rejected": answer("d")}],
    ),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, [PAIR | {"margin": 2.0}]),
    "ranked": (
        {
            "prompt": "\n\nHuman: a\n\nAssistant: ",
            "answers": [{"answer": text, "rank": rank} for text, rank in (("c", 2), ("b", 1), ("x", 1), ("d", 3))],
        },
        [PAIR, PAIR | {"rejected": answer("d")}],
    ),
    "scored": (
        {
            "instruction": "a",
            "completions": [{"response": text, "overall_score": score} for text, score in (("c", 5.5), ("b", 8))],
        },
        [PAIR],
    ),
    "chosen_messages": ({"chosen_messages": say("a", "b"), "rejected_messages": say("a", "c")}, [PAIR]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_rows(name: str) -> None:
    row, expected = PAIRS[name]
    assert rows(row, "preference") == expected


LABELLED: dict[str, tuple[Row, list[Row]]] = {
    "openai": ({"messages": say("a", "b"), "label": True}, [GOOD]),
    "sharegpt": (
        {"conversations": gpt("x", "y", "a", "b"), "kto_tag": False},
        [GOOD | {"prompt": say("x", "y", "a"), "label": False}],
    ),
    "alpaca": ({"instruction": "a", "input": "", "output": "b", "kto_tag": True}, [GOOD]),
    "prompt and completion": ({"prompt": "a", "completion": "b", "label": False}, [GOOD | {"label": False}]),
    "turns": ({"prompt": say("a"), "completion": answer("b"), "label": True}, [GOOD]),
    "a pair": (
        {"prompt": "a", "chosen": "b", "rejected": ["c", "d"]},
        [GOOD, *({**GOOD, "completion": answer(text), "label": False} for text in ("c", "d"))],
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_rows(name: str) -> None:
    row, expected = LABELLED[name]
    assert rows(row, "labelled") == expected


ASKED = {"prompt": say("a"), "tools": None, "reference": None}
PROMPTS: dict[str, tuple[Row, list[Row]]] = {
    "prompt": ({"prompt": "a", "id": 3}, [ASKED]),
    "question": ({"question": "a"}, [ASKED]),
    "prompt as turns": ({"prompt": [*SYSTEM, *say("a")]}, [ASKED | {"prompt": [*SYSTEM, *say("a")]}]),
    "turns without an answer": ({"messages": say("a", "b", "c")}, [ASKED | {"prompt": say("a", "b", "c")}]),
    "gsm8k": ({"question": "a", "answer": "4"}, [ASKED | {"reference": "4"}]),
    "prompt as turns with a solution": ({"prompt": say("a"), "solution": "4"}, [ASKED | {"reference": "4"}]),
    "empty answer": ({"instruction": "a", "input": "", "output": ""}, [ASKED]),
    "chat": ({"messages": say("x", "y", "a", "b")}, [ASKED | {"prompt": say("x", "y", "a"), "reference": "b"}]),
    "pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, [ASKED | {"reference": "b"}]),
    "bad answer": ({"messages": say("a", "b"), "label": False}, [ASKED]),
    "transcript": ({"prompt": "\n\nHuman: a\n\nAssistant:"}, [ASKED]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_rows(name: str) -> None:
    row, expected = PROMPTS[name]
    assert rows(row, "prompt") == expected


def test_text_rows_are_taken_as_they_are() -> None:
    guanaco = "### Human: a\n### Assistant: b"
    assert rows({"text": guanaco}, "text") == [{"text": guanaco}]
    assert rows({"content": " x\n", "url": "u"}, "text") == [{"text": " x\n"}]
    assert rows({"instruction": "a", "output": "b", "text": "c"}, "text") == [{"text": "c"}]


def test_a_declared_transcript_is_a_chat() -> None:
    form = declared("transcript", False, {"messages": "text"}, {}, "chat")
    assert rows({"text": "### Human: a### Assistant: b"}, "chat", form) == chat(say("a", "b"))
    assert rows({"text": "Human: a\n\nAssistant: b"}, "chat", form) == chat(say("a", "b"))
