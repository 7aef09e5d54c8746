"""Chat templates by name: the `.jinja` files of this folder, and what `templates.yaml` says of them.

One decision: a template is known by one name, and by the names that LLaMA-Factory, LLamaTuner and its publisher's files
use for it; all of them mean the same file. Every file has an entry, every entry a file, and no name means two.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from pydantic import Field

from registry.core import Registry, read_text, read_yaml, user_path
from registry.errors import InputError, Problem, did_you_mean
from registry.records import Record

AUTO = "auto"
EOS = "eos_token"
FOLDER = Path(__file__).parent
SHIPPED = FOLDER.parent / "templates.yaml"


class TemplateEntry(Record):
    """A chat template known by name."""

    name: str
    """What a recipe writes."""
    description: str
    """What it looks like, in one sentence."""
    families: tuple[str, ...] = Field(min_length=1)
    """Models it serves."""
    stop_words: tuple[str, ...] = Field(min_length=1)
    """Texts that end an answer when a model writes one; `eos_token` is the tokenizer's own."""
    terminator: str | None = None
    """The stop word that the template writes behind every answer, and that is trained; None: it writes none."""
    default_system: str | None = None
    """System message it writes for a conversation that has none."""
    tool_format: str | None = None
    """How tool calls are written, by LLaMA-Factory's name; None: they are not, and a row that calls one is refused."""
    aliases: tuple[str, ...] = ()
    """Other names that recipes may write."""

    @property
    def path(self) -> Path:
        """The Jinja file."""
        return FOLDER / f"{self.name}.jinja"

    @property
    def summary(self) -> str:
        """Families, stop words and description, as a list shows them."""
        stops = " ".join(word.replace("\n", "\\n") for word in self.stop_words)
        return f"{self.description} For {', '.join(self.families)}. Stops at {stops}"

    def stops_at(self, eos_token: str) -> tuple[str, ...]:
        """The stop words of a tokenizer whose EOS is `eos_token`."""
        return tuple(eos_token if word == EOS else word for word in self.stop_words)


def read_templates() -> Iterator[tuple[str, TemplateEntry]]:
    """Name and entry of every template file.

    Raises:
        ValueError: a file without entry, an entry without file, a terminator that is no stop word.
    """
    raw = read_yaml(SHIPPED.read_text(encoding="utf-8"), str(SHIPPED))
    files = {path.name.removesuffix(".jinja") for path in FOLDER.rglob("*.jinja")}
    if unmatched := files ^ raw.keys():
        raise ValueError(f"{SHIPPED.name} and the .jinja files differ in {', '.join(sorted(unmatched))}")
    for name, values in raw.items():
        entry = TemplateEntry.model_validate({"name": name, **values})
        if entry.terminator is not None and entry.terminator not in entry.stop_words:
            raise ValueError(f"{SHIPPED.name}: the terminator of {name} is not among its stop words")
        yield name, entry


TEMPLATES: Registry[TemplateEntry] = Registry("template", read_templates)
NAMES: Registry[TemplateEntry] = Registry(
    "template", lambda: ((name, entry) for entry in TEMPLATES.values() for name in (entry.name, *entry.aliases))
)
"""Every name a recipe may write, aliases too."""


def find_template(name: str, where: str) -> TemplateEntry:
    """The entry of a name or alias.

    Raises:
        InputError: no template of that name, with the nearest one.
    """
    if name not in NAMES:
        nearest = get_close_matches(name, [AUTO, *NAMES], n=1)
        cure = f"{did_you_mean(name, nearest or [AUTO, *TEMPLATES])} A file ends in .jinja."
        raise InputError(Problem(where, f"{name!r} is not a known template", cure))
    return NAMES[name]


def template_text(name: str, where: str) -> str | None:
    """The Jinja text a recipe means by a template name; None for `auto`.

    Raises:
        InputError: no template and no .jinja file of that name.
    """
    if name == AUTO:
        return None
    if not name.endswith(".jinja"):
        return _shipped_text(find_template(name, where).path)
    path = user_path(name, where)
    if path.is_dir():
        raise InputError(Problem(where, f"{path.absolute()} is a folder, not a template file", "Name the file."))
    if not path.is_file():
        raise InputError(Problem(where, f"the template file {path.absolute()} does not exist", "Check the path."))
    return read_text(path)


@cache
def _shipped_text(path: Path) -> str:
    return read_text(path)
