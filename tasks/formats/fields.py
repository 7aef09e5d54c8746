"""Readers of parts of a row: the question, an answer, tools, a label, a margin.

One decision: a reader is made once for a form, with its columns bound; it takes a row and gives the part, or the
`BadRow` that names the column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tasks.formats.form import Form
from tasks.formats.tool_calls import tools_text
from tasks.formats.turns import Message, Turns, one_text, read_transcript, turns_reader
from tasks.reading import BadRow

Row = Mapping[str, Any]
Messages = Callable[[Row], list[Message] | BadRow]
OWN_TAGS = {"sharegpt": ("from", "value"), "openai": ("role", "content")}


def missing(column: str, row: Row) -> BadRow:
    """A row without a column it needs."""
    found = f"found: {', '.join(map(str, row))}" if row else "the row is empty"
    return BadRow("missing_column", f"the column {column!r} is missing ({found})")


def turns_of(form: Form) -> Turns:
    """The reader of turns of a form that has them, of whole transcripts of one that has those."""
    if form.formatting == "transcript":
        return read_transcript
    role_tag, content_tag = OWN_TAGS[form.formatting]
    return turns_reader(form.tags.get("role_tag", role_tag), form.tags.get("content_tag", content_tag), form.tags)


def prompt_reader(form: Form) -> Messages | None:
    """Everything before the answer, from the prompt column or the conversation; None when the form has neither.

    Of pairs, a conversation column holds the question; of everything else it holds the answer as well.
    """
    names = {**form.optional, **form.columns}
    if form.formatting == "alpaca":
        return _text_prompt(names)
    column = names.get("messages", names.get("prompt"))
    if column is None:
        return None
    read, system_column = turns_of(form), names.get("system")
    transcript = form.formatting == "transcript"
    own_column = "messages" not in names  # a prompt, which may be a text; a conversation is a list of turns
    open_ended, plain = transcript and own_column, own_column and not transcript

    def convert(row: Row) -> list[Message] | BadRow:
        if column not in row:
            return missing(column, row)
        value = row[column]
        messages = one_text(value, "user", column) if plain and isinstance(value, str) else read(value, column)
        if isinstance(messages, BadRow):
            return messages
        if open_ended and len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()  # where the answer goes
        return with_system(messages, row, system_column)

    return convert


def with_system(messages: list[Message], row: Row, column: str | None) -> list[Message] | BadRow:
    """Messages behind the text of the system column; a conversation with a system message of its own keeps that."""
    system = row.get(column) if column else None
    if not system:
        return messages
    if not isinstance(system, str):
        return BadRow("wrong_type", f"{column!r} is {type(system).__name__}, not text")
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def _text_prompt(names: Mapping[str, str]) -> Messages:
    """The question of an alpaca row, behind its system text and history."""
    prompt_column, query_column = names["prompt"], names.get("query")
    system_column, history_column = names.get("system"), names.get("history")

    def convert(row: Row) -> list[Message] | BadRow:
        prompt = row.get(prompt_column)
        if type(prompt) is not str:
            bad = one_text(prompt, "user", prompt_column)
            return missing(prompt_column, row) if prompt_column not in row else bad
        query = row.get(query_column) if query_column else None
        if query:
            if type(query) is not str:
                return BadRow("wrong_type", f"{query_column!r} is {type(query).__name__}, not text")
            prompt = f"{prompt}\n{query}" if prompt else query
        if not prompt or prompt.isspace():
            return BadRow("empty_prompt", f"{prompt_column!r} is empty")
        messages = [{"role": "user", "content": prompt}]
        history = row.get(history_column) if history_column else None
        if history:
            past = _history(history, str(history_column))
            if isinstance(past, BadRow):
                return past
            messages = past + messages
        return with_system(messages, row, system_column)

    return convert


def _history(history: Any, column: str) -> list[Message] | BadRow:
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return BadRow("wrong_type", f"{column!r} is not a list of [question, answer] pairs")
    messages: list[Message] = []
    for index, (question, answer) in enumerate(history):
        if not isinstance(question, str) or not isinstance(answer, str):
            return BadRow("wrong_type", f"{column}[{index}] has a turn that is not text")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def answer_reader(form: Form) -> Turns:
    """The messages of an answer: a text; in forms with turns also a turn, a list of them, or a whole conversation."""
    if form.formatting == "alpaca" or (form.formatting == "transcript" and "prompt" in form.columns):
        return lambda value, where: written(one_text(value, "assistant", where), where)
    read = turns_of(form)
    if form.formatting == "transcript":
        return lambda value, where: written(read(value, where), where)

    def convert(value: Any, where: str) -> list[Message] | BadRow:
        if isinstance(value, str) or value is None:
            return written(one_text(value, "assistant", where), where)
        return written(read([value] if isinstance(value, dict) else value, where), where)

    return convert


def written(answer: list[Message] | BadRow, where: str) -> list[Message] | BadRow:
    """An answer that is one: it ends with the assistant, and is not empty."""
    if isinstance(answer, BadRow):
        return answer
    last = answer[-1]
    if last["role"] != "assistant":
        return BadRow("no_answer", f"{where!r} ends with {last['role']}: a row without an answer")
    if is_empty(last):
        return BadRow("empty_output", f"{where!r} is empty: a row without an answer")
    return answer


def is_empty(message: Message) -> bool:
    """Whether a message has neither text nor a tool call."""
    content = message["content"]
    return (not content or content.isspace()) and "tool_calls" not in message


def unanswered(messages: list[Message]) -> BadRow | None:
    """Why messages in lawful order are no conversation: it starts with a question and ends with an answer."""
    role = messages[0]["role"]
    last = messages[-1]
    if role == "assistant":
        return BadRow("bad_turn_order", "the conversation starts with assistant, not with user")
    if last["role"] != "assistant":
        if last["role"] == "system":
            return BadRow("no_answer", "the conversation has no answer")
        return BadRow("no_answer", f"the conversation ends with {last['role']}: a row without an answer")
    if is_empty(last):
        return BadRow("empty_output", "the last answer is empty: a row without an answer")
    return None


def unasked(messages: list[Message]) -> BadRow | None:
    """Why messages in lawful order are nothing to answer."""
    if messages[0]["role"] == "assistant":
        return BadRow("bad_turn_order", "the conversation starts with assistant, not with user")
    role = messages[-1]["role"]
    if role == "system":
        return BadRow("no_question", "the conversation has a system message only: nothing to answer")
    if role == "assistant":
        return BadRow("bad_turn_order", "the prompt ends with assistant: nothing to answer")
    return None


def tools_reader(form: Form) -> Callable[[Row], str | BadRow | None]:
    """The tools of a row."""
    column = form.columns.get("tools", form.optional.get("tools"))
    if column is None:
        return lambda row: None

    def convert(row: Row) -> str | BadRow | None:
        value = row.get(column)
        return tools_text(value, column) if value else None

    return convert


def label_of(row: Row, column: str) -> bool | BadRow:
    """Whether the answer of a row is a good one."""
    label = row.get(column)
    if isinstance(label, bool):
        return label
    if column not in row:
        return missing(column, row)
    if label is None:
        return BadRow("null_field", f"{column!r} is null")
    return BadRow("wrong_type", f"{column!r} is {label!r}, not true or false")


def margin_of(row: Row, column: str) -> float | BadRow | None:
    """By how much the chosen answer is better, where the source says that."""
    margin = row.get(column)
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        return BadRow("wrong_type", f"{column!r} is {margin!r}, not a number")
    return float(margin)
