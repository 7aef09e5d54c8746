"""A row that cannot be used says why, with its column, field or turn."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from tasks.formats import Form, converter, declared
from tasks.reading import BadRow
from tests.tasks.raw_rows import HUMAN, Row, answer, bad, gpt, say

ALPACA = declared("alpaca", False, {}, {}, "chat")
SHAREGPT = declared("sharegpt", False, {}, {}, "chat")
OPENAI = declared("openai", False, {}, {}, "chat")
KNOWN = "user, human, prompter, assistant, gpt, model, system, developer, tool, function"


def assistant(**fields: Any) -> Row:
    return {"messages": [*say("a"), {"role": "assistant"} | fields]}


CHATS: list[tuple[Form, Row, str, str]] = [
    (ALPACA, {"instruction": "a", "output": ""}, "empty_output", "'output' is empty"),
    (ALPACA, {"instruction": "a", "output": " \n"}, "empty_output", "'output' is empty"),
    (ALPACA, {"instruction": None, "output": "b"}, "null_field", "'instruction' is null"),
    (ALPACA, {"instruction": "a", "output": None}, "null_field", "'output' is null"),
    (ALPACA, {"instruction": "c"}, "missing_column", "the column 'output' is missing (found: instruction)"),
    (ALPACA, {"output": "c"}, "missing_column", "the column 'instruction' is missing (found: output)"),
    (ALPACA, {}, "missing_column", "the column 'instruction' is missing (the row is empty)"),
    (ALPACA, {"instruction": "", "output": "b"}, "empty_prompt", "'instruction' is empty"),
    (ALPACA, {"instruction": ["a"], "output": "b"}, "wrong_type", "'instruction' is list, not text"),
    (ALPACA, {"instruction": "a", "output": ["b"]}, "wrong_type", "'output' is list, not text"),
    (ALPACA, {"instruction": "a", "input": 5, "output": "b"}, "wrong_type", "'input' is int, not text"),
    (ALPACA, {"instruction": "a", "output": "b", "system": 5}, "wrong_type", "'system' is int, not text"),
    (ALPACA, {"instruction": "a", "output": "b", "history": "c"}, "wrong_type", "'history' is not a list of [question"),
    (ALPACA, {"instruction": "a", "output": "b", "history": [["c", 1]]}, "wrong_type", "history[0] has a turn"),
    (SHAREGPT, {"conversations": gpt("a", "b")[1:]}, "bad_turn_order", "starts with assistant, not with user"),
    (SHAREGPT, {"conversations": gpt("a") * 2}, "bad_turn_order", "conversations[1]: user follows user"),
    (SHAREGPT, {"conversations": gpt("a")}, "no_answer", "the conversation ends with user"),
    (
        SHAREGPT,
        {"conversations": [{"from": "narrator", "value": "a"}]},
        "unknown_role",
        f"is 'narrator'; known: {KNOWN}",
    ),
    (SHAREGPT, {"conversations": []}, "wrong_type", "'conversations' is not a list of messages"),
    (SHAREGPT, {"conversations": None}, "wrong_type", "'conversations' is not a list of messages"),
    (SHAREGPT, {"messages": []}, "missing_column", "the column 'conversations' is missing (found: messages)"),
    (SHAREGPT, {"conversations": ["a"]}, "wrong_type", "conversations[0] is not an object"),
    (
        SHAREGPT,
        {"conversations": [*gpt("a"), {"from": "function_call", "value": "{"}]},
        "malformed_json",
        "[1]: a function",
    ),
    (
        SHAREGPT,
        {"conversations": [*gpt("a"), {"from": "function_call", "value": "5"}]},
        "wrong_type",
        "calls with a name",
    ),
    (
        SHAREGPT,
        {"conversations": [*gpt("a"), {"from": "function_call", "value": None}]},
        "malformed_json",
        "[1]: a func",
    ),
    (SHAREGPT, {"conversations": gpt("a", "b"), "tools": "{"}, "malformed_json", "'tools' is not valid JSON"),
    (SHAREGPT, {"conversations": gpt("a", "b"), "tools": "[1]"}, "wrong_type", "'tools' is not a list of objects"),
    (SHAREGPT, {"conversations": gpt("a", "b"), "tools": [{"function": 1}]}, "wrong_type", "the function of a tool in"),
    (OPENAI, {"messages": '[{"role": "user"}]'}, "wrong_type", "'messages' is not a list of messages"),
    (OPENAI, {"messages": say("a", " ")}, "empty_output", "the last answer is empty"),
    (OPENAI, {"messages": [{"role": "user"}]}, "null_field", "messages[0].content is missing or null"),
    (OPENAI, assistant(content=None), "null_field", "messages[1].content is missing or null"),
    (OPENAI, assistant(content=5), "wrong_type", "messages[1].content is int, not text"),
    (OPENAI, {"messages": [{"role": "system", "content": "x"}]}, "no_answer", "the conversation has no answer"),
    (
        OPENAI,
        {"messages": [*say("a", "b"), {"role": "system", "content": "x"}]},
        "bad_turn_order",
        "[2]: system follows",
    ),
    (OPENAI, {"messages": [{"role": "tool", "content": "x"}]}, "bad_turn_order", "the conversation starts with tool"),
    (OPENAI, {"messages": [{"role": ["user"], "content": "a"}]}, "unknown_role", "messages[0].role is ['user']; known"),
    (OPENAI, {"messages": [{"content": "a"}]}, "unknown_role", "messages[0].role is None; known"),
    (OPENAI, assistant(tool_calls="x"), "wrong_type", "messages[1].tool_calls is not a list of calls"),
    (OPENAI, assistant(tool_calls=[{"function": {}}]), "wrong_type", "messages[1].tool_calls[0] has none"),
    (
        OPENAI,
        assistant(tool_calls=[{"name": "f", "arguments": "{"}]),
        "malformed_json",
        "tool_calls[0]: the arguments are",
    ),
    (OPENAI, assistant(tool_calls=[{"name": "f", "arguments": "[1]"}]), "wrong_type", "are list, not an object"),
    (OPENAI, assistant(tool_calls=[{"name": "f", "arguments": {"x": float("nan")}}]), "malformed_json", "tool_calls"),
    (
        OPENAI,
        assistant(tool_calls=[{"name": "f", "arguments": {"x": datetime.date(2024, 1, 1)}}]),
        "wrong_type",
        "date",
    ),
    (OPENAI, assistant(content="b", reasoning=["x"]), "wrong_type", "messages[1]: the reasoning is list, not text"),
    (
        OPENAI,
        assistant(content=[{"type": "image_url"}]),
        "unsupported_content",
        "messages[1].content[0] is of type 'image",
    ),
    (OPENAI, assistant(content=[{"type": "text"}]), "wrong_type", "messages[1].content[0] is NoneType, not text"),
    (OPENAI, assistant(content="b", weight=0), "unsupported_weight", "messages[1].weight is 0"),
]


@pytest.mark.parametrize(("form", "row", "reason", "detail"), CHATS)
def test_a_row_that_is_no_chat_says_why(form: Form, row: Row, reason: str, detail: str) -> None:
    found, said = bad(row, "chat", form)
    assert found == reason
    assert detail in said


def test_bad_alpaca_rows_are_counted_by_reason_and_the_good_one_is_kept() -> None:
    convert = converter(ALPACA, "chat")
    made = [
        convert(row)
        for row in (
            {"instruction": "a", "output": ""},
            {"instruction": None, "output": "b"},
            {"instruction": "c"},
            {"instruction": "d", "output": "ok"},
        )
    ]
    assert [row.reason if isinstance(row, BadRow) else len(row) for row in made] == [
        "empty_output",
        "null_field",
        "missing_column",
        1,
    ]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "tie", "'chosen' and 'rejected' are the same answer"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c", "b"]}, "tie", "'chosen' and 'rejected[1]' are the same"),
        ({"chosen": say("a", "b"), "rejected": say("a", "b")}, "tie", "are the same answer"),
        ({"chosen": HUMAN + "b", "rejected": HUMAN + " b"}, "tie", "are the same answer"),
        (
            {"prompt": "a", "answers": [{"answer": t, "rank": 1} for t in "bc"]},
            "tie",
            "no answer in 'answers' is worse",
        ),
        ({"prompt": "a", "answers": [{"answer": "b", "rank": 1}]}, "no_answer", "'answers' holds 1 answers"),
        (
            {"prompt": "a", "answers": [{"answer": t, "rank": None} for t in "bc"]},
            "wrong_type",
            "answers[0].rank is None",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty_output", "'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "null_field", "'rejected' is null"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "no_answer", "'rejected' is an empty list"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "wrong_type", "'margin' is nan"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty_prompt", "'prompt' is empty"),
        ({"chosen": say("a", "b"), "rejected": say("x", "c")}, "different_prompts", "they part at message 0"),
        (
            {"chosen": say("a", "b", "c", "d"), "rejected": say("a", "b", "x", "d")},
            "different_prompts",
            "they part at message 2",
        ),
        ({"chosen": say("a", "b", "c", "d"), "rejected": say("a", "b")}, "different_prompts", "is the beginning of"),
        ({"chosen": say("a", "b"), "rejected": say("a")}, "no_answer", "'rejected' ends with user"),
        ({"chosen": HUMAN, "rejected": HUMAN + "b"}, "empty_output", "'chosen' is empty"),
        (
            {"chosen": f"{HUMAN}b\n\nAssistant: c", "rejected": HUMAN},
            "bad_turn_order",
            "'chosen', turn 4: assistant fol",
        ),
        (
            {"messages": say("a", "b"), "chosen": answer("c"), "rejected": answer("d")},
            "bad_turn_order",
            "'chosen' is an answer, but the prompt before it ends with assistant",
        ),
    ],
)
def test_a_row_that_is_no_pair_says_why(row: Row, reason: str, detail: str) -> None:
    found, said = bad(row, "preference")
    assert found == reason
    assert detail in said


def test_a_row_without_a_declared_column_names_it_and_those_found() -> None:
    form = declared("alpaca", True, {"prompt": "instruction", "chosen": "good", "rejected": "bad"}, {}, "preference")
    row = {"instruction": "a", "good": "b", "worse": "c"}
    assert bad(row, "preference", form) == (
        "missing_column",
        "the column 'bad' is missing (found: instruction, good, worse)",
    )
    nested = {"instruction": "a", "good": {"from": "gpt", "value": "b"}, "bad": "c"}
    assert bad(nested, "preference", form) == ("wrong_type", "'good' is dict, not text")


@pytest.mark.parametrize(
    ("row", "shape", "reason", "detail"),
    [
        ({"messages": say("a", "b"), "label": "yes"}, "labelled", "wrong_type", "'label' is 'yes', not true or false"),
        ({"messages": say("a", "b"), "label": None}, "labelled", "null_field", "'label' is null"),
        ({"messages": say("a", "b")}, "labelled", "missing_column", "the column 'label' is missing (found: messages)"),
        ({"messages": say("a"), "label": True}, "labelled", "no_answer", "ends with user"),
        ({"messages": say("a", "b"), "label": False}, "chat", "unwanted_answer", "'label' is false"),
        ({"messages": say("a", "b")[1:], "label": True}, "prompt", "bad_turn_order", "starts with assistant"),
        (
            {"messages": [{"role": "system", "content": "a"}], "label": True},
            "prompt",
            "no_question",
            "nothing to answer",
        ),
    ],
)
def test_a_row_that_is_no_labelled_one_says_why(row: Row, shape: str, reason: str, detail: str) -> None:
    found, said = bad(row, shape, Form("openai", False, {"messages": "messages", "kto_tag": "label"}))
    assert found == reason
    assert detail in said


def test_prompts_and_texts_that_cannot_be_used_say_why() -> None:
    assert bad({"prompt": " "}, "prompt") == ("empty_prompt", "'prompt' is empty")
    assert bad({"question": "a", "answer": 5}, "prompt") == ("wrong_type", "'answer' is int, not text")
    assert bad({"prompt": [*say("a", "b"), *answer("c")]}, "prompt")[0] == "bad_turn_order"
    text = Form("text", False, {"text": "text"})
    assert bad({"text": ""}, "text", text) == ("empty_text", "'text' is empty")
    assert bad({"text": None}, "text", text) == ("null_field", "'text' is null")
    assert bad({"body": "a"}, "text", text) == ("missing_column", "the column 'text' is missing (found: body)")


def test_rows_with_pictures_are_refused_and_rows_without_are_not() -> None:
    form = declared("openai", False, {"messages": "messages", "images": "images"}, {}, "chat")
    row = {"messages": say("<image>a", "b"), "images": ["1.jpg"]}
    assert bad(row, "chat", form) == ("unsupported_content", "'images' is not empty; only text can be trained on")
    assert not isinstance(converter(form, "chat")(row | {"images": []}), BadRow)


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"instruction": "a", "output": "b\ud83d"}, "chat"),
        ({"messages": say("\ud83d", "b")}, "chat"),
        ({"conversations": [*gpt("a"), {"from": "function_call", "value": '{"name": "\\ud83d"}'}]}, "chat"),
        ({"conversations": gpt("a", "b"), "tools": '[{"name": "\\ud83d"}]'}, "chat"),
        ({"prompt": "a", "chosen": "b", "rejected": "\ud83d"}, "preference"),
        ({"question": "a", "answer": "\ud83d"}, "prompt"),
        ({"text": "\ud83d"}, "text"),
    ],
)
def test_half_a_character_is_no_text_also_when_json_inside_a_text_spells_it(row: Row, shape: str) -> None:
    assert bad(row, shape)[0] == "not_utf8"
