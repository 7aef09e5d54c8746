"""Pages that a command writes for a browser."""

from __future__ import annotations

import os
from pathlib import Path

from registry.errors import InputError, Problem


def require_page(page: Path, first_line: str) -> None:
    """Refuse a place for a page; a mistyped name must not cost a data set: only an earlier page is written over.

    Args:
        page: the file.
        first_line: what every page of this kind begins with.

    Raises:
        InputError: no such folder, or something there that is no such page.
    """
    where = f"--html {page}"
    if not page.parent.is_dir():
        raise InputError(Problem(where, f"there is no folder {page.parent}", "Make it, or name another file."))
    if not os.path.lexists(page):
        return
    if not page.is_file():
        raise InputError(Problem(where, "is there and is no file", "Name another file."))
    with page.open("rb") as file:
        if file.read(len(first_line)) != first_line.encode():
            raise InputError(Problem(where, "is there and is no such page", "Remove it, or name another file."))


def write_page(page: Path, text: str) -> None:
    """Write it.

    Raises:
        InputError: it cannot be written.
    """
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(Problem(f"--html {page}", f"cannot be written: {error.strerror}", "Name another.")) from error
