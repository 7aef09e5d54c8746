"""Raw rows of alpaca, ShareGPT and OpenAI form to one chat row.

One decision: a chat row is `messages` of role `system user assistant tool` plus `tools`, and nothing is guessed: a
row that does not fit is a `BadRow` with the field and the rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from registry.data_sources import ALPACA, CHAT, OPENAI_TAGS, TAGS
from tasks.reading import BadRow

ChatRow = dict[str, Any]
"""`{"messages": [{"role", "content", "reasoning"?, "tool_calls"?}], "tools"}`; tool_calls and tools are JSON text."""


def detect(row: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """Formatting and columns from the keys of a row; None when they fit nothing known."""
    for column in ("messages", "conversations", "conversation"):
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return ("openai" if "role" in turns[0] else "sharegpt"), {"messages": column}
    if "instruction" in row and "output" in row:
        return "alpaca", {}
    return None


def to_chat(
    row: Mapping[str, Any], formatting: str, columns: Mapping[str, str], tags: Mapping[str, str]
) -> ChatRow | BadRow:
    """One raw row as a chat row.

    Args:
        row: as read from the file.
        formatting: `alpaca`, `sharegpt` or `openai`.
        columns: our column name → the file's, where it differs from the format's own.
        tags: role and content keys, where they differ.
    """
    if formatting == "alpaca":
        return _alpaca(row, ALPACA | dict(columns))
    names = CHAT | {"messages": "messages" if formatting == "openai" else "conversations"} | dict(columns)
    return _conversation(row, names, (OPENAI_TAGS if formatting == "openai" else TAGS) | dict(tags))


def _text(row: Mapping[str, Any], column: str, required: bool) -> str | BadRow:
    """A text field; an optional one that is missing or null is empty."""
    if column not in row:
        return BadRow("missing_column", f"the column {column!r} is missing") if required else ""
    value = row[column]
    if value is None:
        return BadRow("null_field", f"{column!r} is null") if required else ""
    if not isinstance(value, str):
        return BadRow("wrong_type", f"{column!r} is {type(value).__name__}, not text")
    return value


def _alpaca(row: Mapping[str, Any], names: Mapping[str, str]) -> ChatRow | BadRow:
    fields = {}
    for name in ("prompt", "query", "response", "system"):
        value = _text(row, names[name], name in ("prompt", "response"))
        if isinstance(value, BadRow):
            return value
        fields[name] = value
    if not fields["response"].strip():
        return BadRow("empty_output", f"{names['response']!r} is empty: a row without an answer")
    prompt = "\n".join(part for part in (fields["prompt"], fields["query"]) if part)
    if not prompt.strip():
        return BadRow("empty_prompt", f"{names['prompt']!r} is empty")
    messages = [{"role": "system", "content": fields["system"]}] if fields["system"] else []
    history = row.get(names["history"]) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return BadRow("wrong_type", f"{names['history']!r} is not a list of [question, answer] pairs")
    for pair in [*history, [prompt, fields["response"]]]:
        if not all(isinstance(text, str) for text in pair):
            return BadRow("wrong_type", f"{names['history']!r} has a turn that is not text")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return {"messages": messages, "tools": None}


def _conversation(row: Mapping[str, Any], names: Mapping[str, str], tags: Mapping[str, str]) -> ChatRow | BadRow:
    column = names["messages"]
    turns = row.get(column)
    if column not in row:
        return BadRow("missing_column", f"the column {column!r} is missing")
    if not isinstance(turns, list) or not turns:
        return BadRow("wrong_type", f"{column!r} is not a list of messages")
    messages = []
    for index, turn in enumerate(turns):
        message = _message(turn, tags, f"{column}[{index}]")
        if isinstance(message, BadRow):
            return message
        messages.append(message)
    system = _text(row, names["system"], False)
    if isinstance(system, BadRow):
        return system
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = _json_text(row.get(names["tools"]))
    if isinstance(tools, BadRow):
        return tools
    return _order(messages) or {"messages": messages, "tools": tools}


def _message(turn: Any, tags: Mapping[str, str], where: str) -> dict[str, Any] | BadRow:
    if not isinstance(turn, dict):
        return BadRow("wrong_type", f"{where} is not an object")
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["system_tag"]: "system",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "function",
    }
    tag = turn.get(tags["role_tag"])
    if not isinstance(tag, str) or tag not in roles:
        return BadRow("unknown_role", f"{where}.{tags['role_tag']} is {tag!r}; known: {', '.join(roles)}")
    role, content = roles[tag], turn.get(tags["content_tag"])
    calls = turn.get("tool_calls")
    if content is not None and not isinstance(content, str):
        return BadRow("wrong_type", f"{where}.{tags['content_tag']} is {type(content).__name__}, not text")
    if role == "function":  # ShareGPT writes a tool call as a turn of its own, with JSON as its text
        return _function_call(content, where)
    if calls and not (isinstance(calls, list) and all(map(_is_call, calls))):
        return BadRow("wrong_type", f"{where}.tool_calls is not a list of calls with a name")
    if content is None and not calls:
        return BadRow("null_field", f"{where}.{tags['content_tag']} is missing or null")
    message: dict[str, Any] = {"role": role, "content": content}
    reasoning = turn.get("reasoning_content") or turn.get("reasoning")
    if reasoning:
        message["reasoning"] = str(reasoning)
    if calls:
        message["tool_calls"] = json.dumps([_call(call) for call in calls], ensure_ascii=False)
    for extra in ("name", "tool_call_id"):
        if isinstance(turn.get(extra), str):
            message[extra] = turn[extra]
    return message


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, as templates print it; OpenAI's wire form is JSON in a string."""
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return {**call, "type": "function", "function": function}
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": function}


def _is_call(value: Any) -> bool:
    """Whether a value is the call of a function with a name, bare or under `function`."""
    function = value.get("function", value) if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _function_call(content: Any, where: str) -> dict[str, Any] | BadRow:
    try:
        parsed = json.loads(content or "")
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_json", f"{where}: a function call is JSON ({error})")
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(map(_is_call, calls)):
        return BadRow("wrong_type", f"{where}: a function call has a name and arguments")
    return {"role": "assistant", "content": "", "tool_calls": json.dumps([_call(c) for c in calls], ensure_ascii=False)}


def _json_text(value: Any) -> str | BadRow | None:
    """Tools as JSON text; ShareGPT files carry them as a string, others as a list."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            return BadRow("malformed_json", f"'tools' is not JSON ({error})")
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        return BadRow("wrong_type", "'tools' is not a list of objects")
    if any(not isinstance(tool.get("function", {}), dict) for tool in value):
        return BadRow("wrong_type", "the function of a tool is not an object")
    return json.dumps(value, ensure_ascii=False) if value else None


def _order(messages: list[dict[str, Any]]) -> BadRow | None:
    """An optional system message, then turns of user or tool answered by the assistant, the last one an answer."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        return BadRow("no_answer", "the conversation has no answer")
    if turns[0]["role"] != "user":
        return BadRow("bad_turn_order", f"the conversation starts with {turns[0]['role']}, not with user")
    for before, turn in pairwise(turns):
        follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
        if turn["role"] not in follows.get(before["role"], ()):
            return BadRow("bad_turn_order", f"{turn['role']} follows {before['role']}")
    last = turns[-1]
    if last["role"] != "assistant":
        return BadRow("no_answer", f"the conversation ends with {last['role']}: a row without an answer")
    if not (last["content"] or "").strip() and "tool_calls" not in last:
        return BadRow("empty_output", "the last answer is empty: a row without an answer")
    return None
