"""JSON lines, read by line feed only: an answer may hold U+2028 or U+0085, which `str.splitlines` also splits at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.core import read_text
from registry.errors import InputError, Problem


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
