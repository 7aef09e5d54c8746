"""JSON lines, read by line feed only: an answer may hold U+2028 or U+0085, which `str.splitlines` also splits at."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from registry.core import read_text
from registry.errors import InputError, Problem

LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # JSON itself escapes the others


def json_line(value: Any) -> str:
    """A value as a line. Characters that `str.splitlines` takes for the end of a line are escaped."""
    line = json.dumps(value, ensure_ascii=False)
    return LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"


def append_json_line(path: Path, value: Any) -> int:
    """Add a line to a file, made with its folder if it is not there; how many lines it has then.

    One write, which other processes that add lines cannot come between.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        file.seek(0)
        before = file.read()
        end = b"\n" if before and not before.endswith(b"\n") else b""
        file.write(end + json_line(value).encode())
        os.fsync(file.fileno())
    return before.count(b"\n") + len(end) + 1


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON lines file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an absent file is an empty one.

    Raises:
        InputError: it is not UTF-8, not JSON, or not an object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(str(path), f"is not JSON: {error}")) from error
    if not isinstance(value, dict):
        raise InputError(Problem(str(path), f"is not a JSON object but {type(value).__name__}"))
    return value
