"""Where things are printed, and how a command ends.

One decision: with `--json` the last line of standard output is one JSON object and nothing else goes there; what people
read goes to standard error then.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def people(as_json: bool) -> Console:
    """The console people read."""
    return Console(stderr=as_json, highlight=False)


def print_json(value: Any) -> None:
    """The one line of standard output."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # an ASCII terminal, or a file name that is not UTF-8
        text = json.dumps(value)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_error(text: str) -> None:
    """An error, on standard error, as it is: paths are not wrapped so that they can be copied."""
    console = Console(stderr=True, highlight=False)
    console.print("error: ", style="bold red", end="")
    console.print(text, markup=False, soft_wrap=True)
