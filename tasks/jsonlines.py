"""JSON lines, read by line feed only: an answer may hold U+2028 or U+0085, which `str.splitlines` also splits at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON lines file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
