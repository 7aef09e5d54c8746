"""Chat templates by name: the `.jinja` files of this folder."""

from __future__ import annotations

from pathlib import Path

from registry.core import Registry
from registry.errors import InputError, Problem

AUTO = "auto"
FOLDER = Path(__file__).parent

TEMPLATES: Registry[Path] = Registry("template", lambda: [(path.stem, path) for path in sorted(FOLDER.glob("*.jinja"))])


def template_text(name: str, where: str) -> str | None:
    """The Jinja text a recipe means by a template name; None for `auto`.

    Raises:
        InputError: no template and no .jinja file of that name.
    """
    if name == AUTO:
        return None
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(Problem(where, f"the template file {path.absolute()} does not exist", "Check the path."))
    else:
        path = TEMPLATES.lookup(name, where)
    return path.read_text(encoding="utf-8")
