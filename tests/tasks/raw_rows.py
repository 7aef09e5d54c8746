"""Short ways to write raw and canonical rows, shared by the tests of formats."""

from __future__ import annotations

from typing import Any

from tasks.formats import Form, converter, detect
from tasks.reading import BadRow

Row = dict[str, Any]


def say(*texts: str) -> list[Row]:
    """Messages of user and assistant by turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def gpt(*texts: str) -> list[Row]:
    """The same as ShareGPT writes it."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def answer(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


SYSTEM = [{"role": "system", "content": "Be brief"}]


def made(row: Row, shape: str, form: Form | None = None) -> list[Row] | BadRow:
    form = form or detect(row, shape)
    assert form is not None, f"{list(row)} as {shape}"
    return converter(form, shape)(row)


def rows(row: Row, shape: str, form: Form | None = None) -> list[Row]:
    found = made(row, shape, form)
    assert not isinstance(found, BadRow), found
    return found


def bad(row: Row, shape: str, form: Form | None = None) -> tuple[str, str]:
    found = made(row, shape, form)
    assert isinstance(found, BadRow), found
    return found.reason, found.detail


def chat(messages: list[Row], tools: str | None = None) -> list[Row]:
    return [{"messages": messages, "tools": tools}]


PAIR = {"prompt": say("a"), "chosen": answer("b"), "rejected": answer("c"), "tools": None, "margin": None}
GOOD = {"prompt": say("a"), "completion": answer("b"), "tools": None, "label": True}
TOOLS = '[{"type": "function", "function": {"name": "add"}}]'
HUMAN = "\n\nHuman: hi\n\nAssistant:  hello \n\nHuman: more\n\nAssistant: "
