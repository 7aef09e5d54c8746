"""Tools and tool calls as JSON text.

One decision: whatever the source writes (objects, JSON in a string, the bare call of ShareGPT, OpenAI's wire form), a
canonical row holds OpenAI's form with arguments as an object, because that is what chat templates print.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from tasks.reading import BadRow


def calls_text(calls: Any, where: str) -> str | BadRow:
    """The tool calls of a message as JSON text.

    Args:
        calls: a list of calls, bare (`name`, `arguments`) or under `function`; arguments an object or JSON text of one.
        where: of the list, for the error.
    """
    if not isinstance(calls, list) or not calls:
        return BadRow("wrong_type", f"{where} is not a list of calls with a name")
    written = []
    for number, call in enumerate(calls):
        place = f"{where}[{number}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return BadRow("wrong_type", f"{where} is not a list of calls with a name: {place} has none")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.strip():
            arguments = _parsed(arguments, f"{place}: the arguments are")
            if isinstance(arguments, BadRow):
                return arguments
        if arguments is None or isinstance(arguments, str):  # a call without arguments
            arguments = {}
        if not isinstance(arguments, dict):
            return BadRow("wrong_type", f"{place}: the arguments are {type(arguments).__name__}, not an object")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        written.append(named | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return _written(written, where)


def calls_in_text(content: str, where: str) -> str | BadRow:
    """The tool calls of a ShareGPT function call, whose text is the JSON of one call or of a list of them."""
    found = _parsed(content, f"{where}: a function call is JSON,")
    if isinstance(found, BadRow):
        return found
    return calls_text(found if isinstance(found, list) else [found], where)


def joined_calls(first: str, second: str) -> str:
    """Two JSON lists of calls as one."""
    return f"{first[:-1]}, {second[1:]}"


def tools_text(value: Any, column: str) -> str | BadRow | None:
    """The tools of a row as JSON text; None when there are none.

    Args:
        value: a list of tools, JSON text of one, or nothing. A bare function is put under `function`.
        column: its name, for the error.
    """
    if not value:
        return None
    if isinstance(value, str):
        return _tools_from_text(value, column)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        return BadRow("wrong_type", f"{column!r} is not a list of objects")
    if any(not isinstance(tool.get("function", {}), dict) for tool in value):
        return BadRow("wrong_type", f"the function of a tool in {column!r} is not an object")
    tools = [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in value
    ]
    return _written(tools, repr(column))


@lru_cache(maxsize=4096)
def _tools_from_text(text: str, column: str) -> str | BadRow | None:
    """A cache: the rows of a set mostly share their tools, and parsing them is the dearest part of a row."""
    if not text.strip():
        return None
    found = _parsed(text, f"{column!r} is")
    if isinstance(found, BadRow):
        return found
    return tools_text([None] if isinstance(found, str) else found, column)


def _parsed(text: str, said: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_json", f"{said} not valid JSON ({error})")


def _written(value: Any, where: str) -> str | BadRow:
    """JSON text of what a file held; tables hold values that JSON lacks."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        return BadRow("wrong_type", f"{where}: {error}")
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_json", f"{where} cannot be written as JSON ({error})")
