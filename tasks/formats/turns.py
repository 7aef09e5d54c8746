"""Lists of turns (ShareGPT, OpenAI) and transcripts to messages.

One decision: turns are read and their order is checked in one pass, with every name bound before the first row; a turn
that is more than a role and a text takes the long way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tasks.formats.tool_calls import calls_in_text, calls_text, joined_calls
from tasks.reading import BadRow

Message = dict[str, Any]
"""`role`, `content`, and where the source has them `reasoning`, `tool_calls` (JSON text), `name`, `tool_call_id`."""
Turns = Callable[[Any, str], list[Message] | BadRow]
"""A value and its name for errors → messages in a lawful order; where they may start and end is the caller's rule."""

FUNCTION_CALL = "function_call"  # ShareGPT writes a tool call as a turn of its own, with JSON as its text
ROLE_NAMES = {
    "user_tag": ("user", "human", "prompter"),
    "assistant_tag": ("assistant", "gpt", "model"),
    "system_tag": ("system", "developer"),
    "observation_tag": ("tool", "function", "ipython", "observation", "function_response"),
    "function_tag": (FUNCTION_CALL,),
}
ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": FUNCTION_CALL,
}
FOLLOWS = {
    "": frozenset({"system", "user", "assistant"}),
    "system": frozenset({"user"}),
    "user": frozenset({"assistant"}),
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"assistant", "tool"}),
}
"""Role → roles of the next message; whether a conversation may start with the assistant is asked by `from_start`."""
HUMAN_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
HASH_TRANSCRIPT = re.compile(r"\s*###\s*(Human|Assistant):")
PARTS = ("text", "reasoning", "thinking", "tool_call")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def role_table(tags: Mapping[str, str]) -> dict[str, str]:
    """Name in the file → role. A tag that is declared is the only name of its role; else all usual names are known."""
    return {name: role for tag, role in ROLES.items() for name in ((tags[tag],) if tag in tags else ROLE_NAMES[tag])}


def turns_reader(role_tag: str, content_tag: str, tags: Mapping[str, str]) -> Turns:
    """A reader of lists of turns.

    Args:
        role_tag, content_tag: the keys of a turn.
        tags: role names of the file that are not the usual ones.
    """
    roles = role_table(tags)

    def read(turns: Any, where: str) -> list[Message] | BadRow:
        if type(turns) is not list or not turns:
            return BadRow("wrong_type", f"{where!r} is not a list of messages")
        messages: list[Message] = []
        before = ""
        for index, turn in enumerate(turns):
            try:
                role, content = roles[turn[role_tag]], turn[content_tag]
            except (KeyError, TypeError):
                role, content = "", None
            if type(content) is str and len(turn) == 2 and role != FUNCTION_CALL:
                message: Message = {"role": role, "content": content}
            else:
                found = _long_turn(turn, role_tag, content_tag, roles, f"{where}[{index}]")
                if isinstance(found, BadRow):
                    return found
                if role == FUNCTION_CALL and before == "assistant":
                    _add_calls(messages[-1], found)
                    continue
                message, role = found, found["role"]
            if role not in FOLLOWS[before]:
                return _out_of_order(f"{where}[{index}]", role, before)
            messages.append(message)
            before = role
        return messages

    return read


def _out_of_order(where: str, role: str, before: str) -> BadRow:
    if not before:
        return BadRow("bad_turn_order", f"{where}: the conversation starts with {role}, not with user")
    return BadRow("bad_turn_order", f"{where}: {role} follows {before}")


def _add_calls(message: Message, call: Message) -> None:
    """Text and the calls behind it are one turn of the assistant, and so are several calls in a row."""
    calls = call["tool_calls"]
    message["tool_calls"] = joined_calls(message["tool_calls"], calls) if "tool_calls" in message else calls
    thoughts = [part["reasoning"] for part in (message, call) if "reasoning" in part]
    if thoughts:
        message["reasoning"] = "\n".join(thoughts)


def _long_turn(turn: Any, role_tag: str, content_tag: str, roles: Mapping[str, str], where: str) -> Message | BadRow:
    """A turn with more than a role and a text, or one that is wrong."""
    if not isinstance(turn, dict):
        return BadRow("wrong_type", f"{where} is not an object")
    tag = turn.get(role_tag)
    role = roles.get(tag) if isinstance(tag, str) else None
    if role is None:
        return BadRow("unknown_role", f"{where}.{role_tag} is {tag!r}; known: {', '.join(roles)}")
    content, reasoning, written = turn.get(content_tag), None, None
    if isinstance(content, list):
        parts = _joined_parts(content, f"{where}.{content_tag}")
        if isinstance(parts, BadRow):
            return parts
        content, reasoning, written = parts
    if content is not None and not isinstance(content, str):
        return BadRow("wrong_type", f"{where}.{content_tag} is {type(content).__name__}, not text")
    if role == FUNCTION_CALL:
        return _function_turn(content, where)
    calls = _calls(turn, where) if written is None else written
    if isinstance(calls, BadRow):
        return calls
    if content is None and calls is None and role == "tool":
        content = ""  # a tool that gave nothing back
    if content is None and calls is None:
        return BadRow("null_field", f"{where}.{content_tag} is missing or null")
    message: Message = {"role": role, "content": content}
    for key in ("reasoning_content", "reasoning", "thinking"):
        reasoning = reasoning or turn.get(key)
    if reasoning and not isinstance(reasoning, str):
        return BadRow("wrong_type", f"{where}: the reasoning is {type(reasoning).__name__}, not text")
    if reasoning:
        message["reasoning"] = reasoning
    if calls is not None:
        message["tool_calls"] = calls
    for extra in ("name", "tool_call_id"):
        if isinstance(turn.get(extra), str):
            message[extra] = turn[extra]
    return _unweighted(turn, role, where) or message


def _calls(turn: Mapping[str, Any], where: str) -> str | BadRow | None:
    """`tool_calls`, or the one `function_call` of OpenAI's first form."""
    if turn.get("tool_calls"):
        return calls_text(turn["tool_calls"], f"{where}.tool_calls")
    if turn.get("function_call"):
        return calls_text([turn["function_call"]], f"{where}.function_call")
    return None


def _unweighted(turn: Mapping[str, Any], role: str, where: str) -> BadRow | None:
    """An answer that its file wants left out of training, or counted by half, is not trained on in silence."""
    for key in ("weight", "loss_weight"):
        if role == "assistant" and turn.get(key) not in (None, 1):
            rule = f"{where}.{key} is {turn[key]!r}, but every answer counts as 1"
            return BadRow(
                "unsupported_weight", f"{rule}; take the key out, or split the conversation before this answer"
            )
    return None


def _function_turn(content: str | None, where: str) -> Message | BadRow:
    """A tool call as the JSON text of a turn, with what was thought before it in `<think>` where a file has that."""
    text, message = (content or "").strip(), {"role": "assistant", "content": ""}
    if text.startswith("<think>") and "</think>" in text:
        thought, text = text.removeprefix("<think>").split("</think>", 1)
        message["reasoning"] = thought.strip()
    calls = calls_in_text(text, where)
    return calls if isinstance(calls, BadRow) else message | {"tool_calls": calls}


def _joined_parts(parts: list[Any], where: str) -> tuple[str | None, str | None, str | None] | BadRow:
    """Content given as a list of parts: its text, reasoning and tool calls, each in the order of the parts."""
    text, reasoning, calls = list[str](), list[str](), list[Any]()
    for index, part in enumerate(parts):
        kind, value = "text", part
        if isinstance(part, dict):
            kind = part.get("type") or "text"
            if kind not in PARTS:
                what = f"{where}[{index}] is of type {kind!r}"
                return BadRow("unsupported_content", f"{what}; only text can be trained on")
            value = next((part[key] for key in ("text", "value", "content", kind) if part.get(key) is not None), None)
        if not isinstance(value, str):
            return BadRow("wrong_type", f"{where}[{index}] is {type(value).__name__}, not text")
        (calls if kind == "tool_call" else text if kind == "text" else reasoning).append(value)
    written = None
    for value in calls:
        call = calls_in_text(value, where)
        if isinstance(call, BadRow):
            return call
        written = call if written is None else joined_calls(written, call)
    return "".join(text) if text or not calls else None, "".join(reasoning) or None, written


def read_transcript(text: Any, where: str) -> list[Message] | BadRow:
    """A conversation written as one text, `\\n\\nHuman: …\\n\\nAssistant: …` or `### Human: … ### Assistant: …`.

    White space around a turn is not part of it.
    """
    if not isinstance(text, str):
        return BadRow("wrong_type", f"{where!r} is {type(text).__name__}, not text")
    hashes = text.lstrip().startswith("###")
    head, *pieces = HASH_TRANSCRIPT.split(text) if hashes else HUMAN_TRANSCRIPT.split(f"\n\n{text.lstrip()}")
    if head.strip() or not pieces:
        return BadRow("bad_turn_order", f"{where!r} does not start with Human:")
    messages: list[Message] = []
    before = ""
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        role = SPEAKERS[speaker]
        if role not in FOLLOWS[before]:
            return _out_of_order(f"{where!r}, turn {len(messages)}", role, before)
        messages.append({"role": role, "content": said.strip()})
        before = role
    return messages


def is_transcript(text: Any) -> bool:
    """Whether a text is a conversation from its first word on."""
    return isinstance(text, str) and text.lstrip().startswith(("Human:", "### Human:"))


def one_text(content: Any, role: str, where: str) -> list[Message] | BadRow:
    """A text as one message."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if content is None:
        return BadRow("null_field", f"{where!r} is null")
    return BadRow("wrong_type", f"{where!r} is {type(content).__name__}, not text")
