"""Data files to raw rows, one at a time.

One decision: a row that cannot be read is a value (`BadRow`), not an exception, so one policy decides about all bad
rows and every one of them is reported with its file and place.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem


@dataclass(frozen=True)
class BadRow:
    """A row left out, and why. `reason` is a short code to count by, `detail` a sentence."""

    reason: str
    detail: str


@dataclass(frozen=True)
class RawRow:
    """One row of a file."""

    row: int
    """0-based number of the row in its file; blank lines do not count."""
    place: str
    """For people: `line 3` or `row 2`."""
    value: dict[str, Any] | BadRow


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a .json (array) or .jsonl file, in file order.

    Raises:
        InputError: a JSON array that does not parse, or a file that holds neither an array nor lines of JSON.
    """
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        yield from _array(path)
    else:
        yield from _lines(path)


def _array(path: Path) -> Iterator[RawRow]:
    try:
        found = json.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        values = [_mapping(value) for value in found]
    except UnicodeDecodeError as error:
        raise InputError(
            Problem(str(path), f"not UTF-8 text at byte {error.start}", "Save the file as UTF-8.")
        ) from error
    except json.JSONDecodeError as error:
        rule = f"not valid JSON: {error.msg} in column {error.colno}"
        raise InputError(Problem(f"{path}:{error.lineno}", rule, "Mend the file.")) from error
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(str(path), f"not readable JSON: {error}", "Mend the file.")) from error
    for row, value in enumerate(values):
        yield RawRow(row, f"row {row}", value)


def _lines(path: Path) -> Iterator[RawRow]:
    row = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            yield RawRow(row, f"line {number}", _parsed(text))
            row += 1


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
    try:
        return _mapping(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", f"byte {error.start} of the line is not UTF-8 text; save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_json", f"not valid JSON ({error})")


def _mapping(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return (
            value
            if _writable(value)
            else BadRow("not_utf8", "half of a surrogate pair (\\ud800 to \\udfff) is no text")
        )
    return BadRow("not_an_object", f"a row is a JSON object, this is {type(value).__name__}")


def _writable(value: Any) -> bool:
    """Whether every text in a row can be written as UTF-8: an escape in JSON can spell half a character."""
    if isinstance(value, dict):
        return all(_writable(key) and _writable(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_writable, value))
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
