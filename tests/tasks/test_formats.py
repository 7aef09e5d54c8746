"""Raw rows become chat rows, or say why not; every row that goes in comes out or is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from tasks.formats import detect, to_chat
from tasks.reading import BadRow, read_rows


def reason(row: Any, formatting: str) -> str | None:
    found = to_chat(row, formatting, {}, {})
    return found.reason if isinstance(found, BadRow) else None


def turns(row: Any, formatting: str) -> list[tuple[str, str]]:
    found = to_chat(row, formatting, {}, {})
    assert not isinstance(found, BadRow)
    return [(message["role"], message["content"]) for message in found["messages"]]


def test_alpaca_with_input_system_and_history() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief", "history": [["hi", "hello"]]}
    assert turns(row, "alpaca") == [
        ("system", "Be brief"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "Add\n1 2"),
        ("assistant", "3"),
    ]


def test_sharegpt_with_a_function_call_and_its_observation() -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    row = {
        "conversations": [
            {"from": "human", "value": "sum?"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "1"},
        ],
        "tools": json.dumps([{"name": "add"}]),
    }
    found = to_chat(row, "sharegpt", {}, {})
    assert not isinstance(found, BadRow)
    assert [m["role"] for m in found["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(found["messages"][1]["tool_calls"]) == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]


def test_openai_messages_with_null_content_and_arguments_as_a_string() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "2"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "sum?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
            {"role": "assistant", "content": "3", "reasoning_content": "easy"},
        ]
    }
    found = to_chat(row, "openai", {}, {})
    assert not isinstance(found, BadRow)
    assert json.loads(found["messages"][1]["tool_calls"])[0]["function"]["arguments"] == {"a": 1, "b": "2"}
    assert found["messages"][3]["reasoning"] == "easy"


@pytest.mark.parametrize(
    ("row", "formatting", "expected"),
    [
        ({"instruction": "a", "output": ""}, "alpaca", "empty_output"),
        ({"instruction": None, "output": "b"}, "alpaca", "null_field"),
        ({"instruction": "c"}, "alpaca", "missing_column"),
        ({"instruction": "", "output": "b"}, "alpaca", "empty_prompt"),
        ({"instruction": ["a"], "output": "b"}, "alpaca", "wrong_type"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "sharegpt", "bad_turn_order"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "sharegpt", "bad_turn_order"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt", "no_answer"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "sharegpt", "unknown_role"),
        ({"conversations": []}, "sharegpt", "wrong_type"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
            "openai",
            "empty_output",
        ),
        ({"messages": [{"role": "user"}]}, "openai", "null_field"),
        ({"messages": [{"role": "system", "content": "x"}]}, "openai", "no_answer"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: Any, formatting: str, expected: str) -> None:
    assert reason(row, formatting) == expected


def test_the_format_is_found_from_the_columns() -> None:
    assert detect({"instruction": "a", "output": "b"}) == ("alpaca", {})
    assert detect({"conversations": [{"from": "human"}]}) == ("sharegpt", {"messages": "conversations"})
    assert detect({"conversations": [{"role": "user"}]}) == ("openai", {"messages": "conversations"})
    assert detect({"question": "a"}) is None


def test_lines_keep_their_numbers_when_one_is_torn_or_blank(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n{"instruction": "brok\n\xff\xfe\n[1]\n')
    rows = list(read_rows(path))
    assert [(row.row, row.place) for row in rows] == [
        (0, "line 1"),
        (1, "line 3"),
        (2, "line 4"),
        (3, "line 5"),
        (4, "line 6"),
    ]
    assert [row.value.reason if isinstance(row.value, BadRow) else row.value for row in rows] == [
        {"a": 1},
        {"a": 2},
        "malformed_json",
        "not_utf8",
        "not_an_object",
    ]


def test_an_array_that_does_not_parse_is_one_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a"')
    with pytest.raises(InputError, match=r"rows\.json:1: not valid JSON"):
        list(read_rows(path))
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(InputError, match="not UTF-8 text at byte 8"):
        list(read_rows(path))
