"""Chat templates by name: the `.jinja` files of this folder."""

from __future__ import annotations

from pathlib import Path

from registry.core import Registry, read_text, user_path
from registry.errors import InputError, Problem, did_you_mean

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
        path = user_path(name, where)
        if path.is_dir():
            raise InputError(Problem(where, f"{path.absolute()} is a folder, not a template file", "Name the file."))
        if not path.is_file():
            raise InputError(Problem(where, f"the template file {path.absolute()} does not exist", "Check the path."))
    else:
        if name not in TEMPLATES:
            cure = did_you_mean(name, [AUTO, *TEMPLATES])
            raise InputError(Problem(where, f"{name!r} is not a known template", f"{cure} A file ends in .jinja."))
        path = TEMPLATES[name]
    return read_text(path)
