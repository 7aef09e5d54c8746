"""Raw rows of every form become chat rows, literally these."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.formats import Form, converter
from tasks.reading import BadRow
from tests.tasks.raw_rows import SYSTEM, TOOLS, Row, answer, chat, gpt, rows, say

CALL = '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "2"}}}]'

CHATS: dict[str, tuple[Row, list[Row]]] = {
    "alpaca": ({"instruction": "a", "input": "b", "output": "c"}, chat(say("a\nb", "c"))),
    "alpaca whole": (
        {"instruction": "a", "input": "", "output": "c", "system": "Be brief", "history": [["hi", "hello"]]},
        chat([*SYSTEM, *say("hi", "hello", "a", "c")]),
    ),
    "alpaca with nulls": (
        {"instruction": "a", "input": None, "output": "c", "system": None, "history": None},
        chat(say("a", "c")),
    ),
    "input alone": ({"instruction": "", "input": "b", "output": "c"}, chat(say("b", "c"))),
    "alpaca with tools": (
        {"instruction": "a", "output": "c", "tools": '[{"name": "add"}]'},
        chat(say("a", "c"), TOOLS),
    ),
    "dolly": ({"instruction": "a", "context": "b", "response": "c", "category": "x"}, chat(say("a\nb", "c"))),
    "prompt and completion": ({"prompt": "a", "completion": "c"}, chat(say("a", "c"))),
    "prompt and response": ({"prompt": "a", "response": "c"}, chat(say("a", "c"))),
    "question and answer": ({"question": "a", "answer": "c"}, chat(say("a", "c"))),
    "input and output": ({"input": "a", "output": "c"}, chat(say("a", "c"))),
    "query and response": ({"query": "a", "response": "c"}, chat(say("a", "c"))),
    "openorca": ({"system_prompt": "Be brief", "question": "a", "response": "c"}, chat([*SYSTEM, *say("a", "c")])),
    "instances": (
        {"instruction": "a", "instances": [{"input": "b", "output": "c"}, {"input": "", "output": "d"}]},
        chat(say("a\nb", "c")) + chat(say("a", "d")),
    ),
    "sharegpt": ({"conversations": gpt("a", "b", "c", "d")}, chat(say("a", "b", "c", "d"))),
    "sharegpt system column": (
        {"conversations": gpt("a", "b"), "system": "Be brief", "tools": "[]"},
        chat([*SYSTEM, *say("a", "b")]),
    ),
    "sharegpt system turn": (
        {"conversations": [{"from": "system", "value": "Be brief"}, *gpt("a", "b")], "system": "Be long"},
        chat([*SYSTEM, *say("a", "b")]),
    ),
    "openai": ({"messages": say("a", "b")}, chat(say("a", "b"))),
    "openai under conversations": ({"conversations": say("a", "b")}, chat(say("a", "b"))),
    "table with null fields": (
        {"messages": [turn | {"name": None, "tool_calls": None} for turn in say("a", "b")]},
        chat(say("a", "b")),
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be brief"}, *say("a", "b")]},
        chat([*SYSTEM, *say("a", "b")]),
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, *answer("c")]},
        chat(say("ab", "c")),
    ),
    "prompt and completion as turns": ({"prompt": say("a"), "completion": answer("b")}, chat(say("a", "b"))),
    "chosen of a pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, chat(say("a", "b"))),
    "chosen of whole conversations": ({"chosen": say("a", "b"), "rejected": say("a", "")}, chat(say("a", "b"))),
    "good answer": ({"messages": say("a", "b"), "label": True}, chat(say("a", "b"))),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_rows(name: str) -> None:
    row, expected = CHATS[name]
    assert rows(row, "chat") == expected


def test_text_before_calls_several_calls_and_several_results_are_kept_in_order() -> None:
    conversation = [
        *gpt("sum?", "Let me add."),
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": "2"}}'},
        {"from": "function_call", "value": '{"name": "now"}'},
        {"from": "observation", "value": "3"},
        {"from": "observation", "value": ""},
        {"from": "gpt", "value": "3"},
    ]
    assert rows({"conversations": conversation, "tools": [{"name": "add"}]}, "chat") == chat(
        [
            *say("sum?"),
            {
                "role": "assistant",
                "content": "Let me add.",
                "tool_calls": CALL[:-1] + ', {"type": "function", "function": {"name": "now", "arguments": {}}}]',
            },
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": ""},
            *answer("3"),
        ],
        TOOLS,
    )


@pytest.mark.parametrize("arguments", ['{"a": 1, "b": "2"}', {"a": 1, "b": "2"}])
@pytest.mark.parametrize("content", [None, "Let me add."])
def test_openai_tool_calls(arguments: Any, content: str | None) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [
        *say("sum?"),
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": None, "tool_call_id": "c1", "name": "add"},
        {"role": "ipython", "content": "3"},
        {"role": "assistant", "content": "3", "reasoning_content": "easy"},
    ]
    assert rows({"messages": messages}, "chat") == chat(
        [
            *say("sum?"),
            {"role": "assistant", "content": content, "tool_calls": CALL.replace("[{", '[{"id": "c1", ')},
            {"role": "tool", "content": "", "name": "add", "tool_call_id": "c1"},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3", "reasoning": "easy"},
        ]
    )


def test_each_row_keeps_its_own_arguments_without_keys_of_another() -> None:
    convert = converter(Form("openai", False, {"messages": "messages"}), "chat")
    for arguments in ({"a": 1, "b": "2"}, {"city": "Oslo"}, {"city": None}):
        call = {"function": {"name": "add", "arguments": arguments}}
        found = convert({"messages": [*say("?"), {"role": "assistant", "tool_calls": [call]}]})
        assert not isinstance(found, BadRow)
        assert json.loads(found[0]["messages"][1]["tool_calls"])[0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "b", "reasoning": "hm"},
        {"role": "assistant", "content": "b", "thinking": "hm"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "b"}]},
    ],
)
def test_reasoning_is_kept_apart_from_the_answer(turn: Row) -> None:
    thought = {"role": "assistant", "content": "b", "reasoning": "hm"}
    assert rows({"messages": [*say("a"), turn]}, "chat") == chat([*say("a"), thought])


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1, "b": "2"}'}},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": "2"}}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1, "b": "2"}}'}],
        },
    ],
)
def test_other_ways_to_write_a_call(turn: Row) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": CALL}
    assert rows({"messages": [*say("a"), turn]}, "chat") == chat([*say("a"), call])


def test_a_thought_before_a_sharegpt_call_is_its_reasoning() -> None:
    value = '<think>\nhm\n</think>\n{"name": "add", "arguments": {"a": 1, "b": "2"}}'
    call = {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": CALL}
    assert rows({"conversations": [*gpt("a"), {"from": "function_call", "value": value}]}, "chat") == chat(
        [*say("a"), call]
    )
