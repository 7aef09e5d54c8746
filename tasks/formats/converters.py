"""Raw rows to canonical rows.

One decision: everything that depends on the form is bound before the first row; a converter then takes a row in one
pass and gives one or more canonical rows, or the `BadRow` that says why not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from registry.errors import InputError
from tasks.formats.answers import chosen_reader, pairs_reader, whole
from tasks.formats.fields import (
    Messages,
    Row,
    answer_reader,
    label_of,
    margin_of,
    missing,
    prompt_reader,
    tools_reader,
    unanswered,
    unasked,
)
from tasks.formats.form import MEDIA, Form, misfit
from tasks.formats.turns import Message, one_text
from tasks.reading import BadRow

Canonical = dict[str, Any]
Converter = Callable[[Row], list[Canonical] | BadRow]
Conversation = Callable[[Row], list[Message] | BadRow]


def converter(form: Form, shape: str) -> Converter:
    """The function from a raw row to its canonical rows.

    Args:
        form: how the rows are read.
        shape: one of `SHAPES`.

    Returns:
        A function that gives one or more rows of the shape, all texts of them UTF-8, or a `BadRow`.

    Raises:
        InputError: the source cannot give this shape; what it needs and what was found.
    """
    problem = misfit(form, shape)
    if problem is not None:
        raise InputError(problem)
    makers: dict[str, Callable[[Form], Converter]] = {
        "text": _text,
        "chat": _chat,
        "preference": _preference,
        "labelled": _labelled,
        "prompt": _prompt,
    }
    convert = makers[shape](form)
    if "instances" in form.columns:
        convert = _each_instance(convert, form.columns["instances"])
    media = [form.columns[name] for name in MEDIA if name in form.columns]
    return _encodable(_text_only(convert, media) if media else convert)


def _encodable(convert: Converter) -> Converter:
    """Refuse rows with half a character: a table, or JSON inside a text, can hold one, and no file can."""

    def checked(row: Row) -> list[Canonical] | BadRow:
        rows = convert(row)
        if isinstance(rows, BadRow):
            return rows
        for made in rows:
            for value in made.values():
                if type(value) is list:
                    for message in value:
                        for text in message.values():
                            if text is not None and not text.isascii() and not _is_utf8(text):
                                return NOT_UTF8
                elif type(value) is str and not value.isascii() and not _is_utf8(value):
                    return NOT_UTF8
        return rows

    return checked


NOT_UTF8 = BadRow("not_utf8", "half of a surrogate pair (\\ud800 to \\udfff) is no text")


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-32-le")  # refuses what UTF-8 refuses, in half the time
    except UnicodeEncodeError:
        return False
    return True


def _each_instance(convert: Converter, column: str) -> Converter:
    """Rows of one task with several inputs and outputs in a list, each a row together with the columns of the task."""

    def each(row: Row) -> list[Canonical] | BadRow:
        instances = row.get(column)
        if column not in row:
            return missing(column, row)
        if not isinstance(instances, list) or not instances or not all(isinstance(own, dict) for own in instances):
            return BadRow("wrong_type", f"{column!r} is not a list of objects")
        rows: list[Canonical] = []
        for index, own in enumerate(instances):
            made = convert({**row, **own})
            if isinstance(made, BadRow):
                return BadRow(made.reason, f"{column}[{index}]: {made.detail}")
            rows += made
        return rows

    return each


def _text_only(convert: Converter, columns: list[str]) -> Converter:
    def checked(row: Row) -> list[Canonical] | BadRow:
        for column in columns:
            if row.get(column):
                return BadRow("unsupported_content", f"{column!r} is not empty; only text can be trained on")
        return convert(row)

    return checked


def _text(form: Form) -> Converter:
    column = form.columns["text"]

    def convert(row: Row) -> list[Canonical] | BadRow:
        text = row.get(column)
        if type(text) is not str:
            bad = one_text(text, "user", column)
            return missing(column, row) if column not in row else bad
        if not text or text.isspace():
            return BadRow("empty_text", f"{column!r} is empty")
        return [{"text": text}]

    return convert


def _conversation(form: Form) -> Conversation:
    """The whole conversation of a row, whose last message is the answer to train on."""
    if form.ranking:
        return chosen_reader(form)
    read_prompt: Messages | None = prompt_reader(form)
    assert read_prompt is not None  # a form that holds chat has a conversation or a prompt
    if "response" not in form.columns:
        return read_prompt
    column, read_answer = form.columns["response"], answer_reader(form)
    plain = form.formatting == "alpaca"

    def convert(row: Row) -> list[Message] | BadRow:
        messages = read_prompt(row)
        if isinstance(messages, BadRow):
            return messages
        answer = row.get(column)
        if plain and type(answer) is str and answer and not answer.isspace():
            messages.append({"role": "assistant", "content": answer})
            return messages
        if column not in row:
            return missing(column, row)
        found = read_answer(answer, column)
        return found if isinstance(found, BadRow) else whole(messages, found, column)

    return convert


def _chat(form: Form) -> Converter:
    read, read_tools = _conversation(form), tools_reader(form)
    label_column = form.columns.get("kto_tag")

    def convert(row: Row) -> list[Canonical] | BadRow:
        if label_column is not None:
            label = label_of(row, label_column)
            if isinstance(label, BadRow):
                return label
            if not label:
                rule = f"{label_column!r} is false: the answer is marked as bad"
                return BadRow("unwanted_answer", f"{rule}, and this stage would learn it")
        messages = read(row)
        if isinstance(messages, BadRow):
            return messages
        bad = unanswered(messages)
        if bad is not None:
            return bad
        tools = read_tools(row)
        return tools if isinstance(tools, BadRow) else [{"messages": messages, "tools": tools}]

    return convert


def _preference(form: Form) -> Converter:
    read, read_tools, margin_column = pairs_reader(form), tools_reader(form), form.columns.get("margin")

    def convert(row: Row) -> list[Canonical] | BadRow:
        pairs = read(row)
        if isinstance(pairs, BadRow):
            return pairs
        tools = read_tools(row)
        if isinstance(tools, BadRow):
            return tools
        margin = margin_of(row, margin_column) if margin_column else None
        if isinstance(margin, BadRow):
            return margin
        return [
            {"prompt": prompt, "chosen": better, "rejected": worse, "tools": tools, "margin": margin}
            for prompt, better, worse in pairs
        ]

    return convert


def _labelled(form: Form) -> Converter:
    if form.ranking:
        return _unpaired(_preference(form))
    read, read_tools, column = _conversation(form), tools_reader(form), form.columns["kto_tag"]

    def convert(row: Row) -> list[Canonical] | BadRow:
        label = label_of(row, column)
        messages = label if isinstance(label, BadRow) else read(row)
        if isinstance(messages, BadRow):
            return messages
        bad = unanswered(messages)
        if bad is not None:
            return bad
        tools = read_tools(row)
        if isinstance(tools, BadRow):
            return tools
        return [{"prompt": messages[:-1], "completion": messages[-1:], "tools": tools, "label": label}]

    return convert


def _unpaired(convert: Converter) -> Converter:
    """Each answer of a row's pairs once, the chosen one as true and the rejected ones as false."""

    def unpaired(row: Row) -> list[Canonical] | BadRow:
        pairs = convert(row)
        if isinstance(pairs, BadRow):
            return pairs
        answers = [(pairs[0], "chosen"), *((pair, "rejected") for pair in pairs)]
        return [
            {"prompt": pair["prompt"], "completion": pair[name], "tools": pair["tools"], "label": name == "chosen"}
            for pair, name in answers
        ]

    return unpaired


def _prompt(form: Form) -> Converter:
    read: Conversation | None = chosen_reader(form) if form.ranking else prompt_reader(form)
    assert read is not None  # a form without pairs has a conversation or a prompt
    read_tools, label_column = tools_reader(form), form.columns.get("kto_tag")
    response = None if form.ranking else form.columns.get("response")
    read_answer = answer_reader(form)

    def convert(row: Row) -> list[Canonical] | BadRow:
        label = label_of(row, label_column) if label_column else True
        messages = label if isinstance(label, BadRow) else read(row)
        if isinstance(messages, BadRow):
            return messages
        reference = None
        if response is not None:
            answer = row.get(response)
            found = read_answer(answer, response) if answer else None
            if isinstance(found, BadRow) and found.reason != "empty_output":
                return found
            reference = None if found is None or isinstance(found, BadRow) else found[-1]["content"]
        elif len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages, reference = messages[:-1], messages[-1]["content"]
        bad = unasked(messages)
        if bad is not None:
            return bad
        tools = read_tools(row)
        if isinstance(tools, BadRow):
            return tools
        known = reference if label and reference and not reference.isspace() else None
        return [{"prompt": messages, "tools": tools, "reference": known}]

    return convert
