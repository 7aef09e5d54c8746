"""What is known by name: one typed, lazy registry.

One decision: a registry is filled by a function on first use, so importing it costs nothing, and is then frozen; two
entries of one name are an error when it is filled, and an unknown name is answered with the nearest ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from registry.errors import InputError, Problem, did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name → entry.

    Args:
        kind: what its entries are, in the singular, for messages: `model`.
        load: yields (name, entry) pairs.
    """

    def __init__(self, kind: str, load: Callable[[], Iterable[tuple[str, T]]]) -> None:
        self.kind = kind
        self._load = load

    @cached_property
    def entries(self) -> dict[str, T]:
        """All entries, in the order of their source.

        Raises:
            ValueError: two entries have one name.
        """
        entries: dict[str, T] = {}
        for name, entry in self._load():
            if name in entries:
                raise ValueError(f"the {self.kind} registry has {name!r} twice")
            entries[name] = entry
        return entries

    def lookup(self, name: str, where: str) -> T:
        """The entry of a name.

        Args:
            name: as a person wrote it.
            where: key path or file, for the error.

        Raises:
            InputError: unknown, with the nearest names.
        """
        if name not in self.entries:
            raise InputError(
                Problem(where, f"{name!r} is not a known {self.kind}", did_you_mean(name, list(self.entries)))
            )
        return self.entries[name]

    def __getitem__(self, name: str) -> T:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class RecipeLoader(yaml.SafeLoader):
    """YAML as people expect it: `2e-4` is a number, a key is text, a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML, but a repeated key is refused instead of the last one winning."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise yaml.MarkedYAMLError(None, None, f"a key is text, not {shown}", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    None, None, f"key {key!r} is written twice, first in line {seen[key]}", key_node.start_mark
                )
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As in PyYAML, with the line also where its constructors fail: a 13th month, an integer too long to read."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, LookupError) as error:
            raise yaml.MarkedYAMLError(None, None, f"a value that cannot be read ({error})", node.start_mark) from error


# YAML 1.1 wants a dot and a signed exponent in a float; people write 2e-4 and 1E6.
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


LARGEST = 100_000  # values in one file, aliases expanded: ten lines of aliases to aliases can mean 10^10


def read_yaml(text: str, where: str) -> Any:
    """YAML or JSON text as plain values.

    Raises:
        InputError: it does not parse, with line and column.
    """
    try:
        value = _read(text)
        if _size(value, {}) > LARGEST:
            raise InputError(Problem(where, f"it holds more than {LARGEST:,} values", "Aliases (*name) count in full."))
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}" if mark else where
        raise InputError(Problem(place, f"not valid YAML or JSON: {error.problem or error.context}")) from error
    except yaml.YAMLError as error:
        raise InputError(Problem(where, f"not valid YAML or JSON: {error}")) from error
    except RecursionError as error:
        raise InputError(Problem(where, "not valid YAML or JSON: nested too deeply")) from error


def _read(text: str) -> Any:
    """JSON as JSON, which YAML reads differently (tabs, `\\ud83d\\ude00`); anything else, also broken JSON, as YAML."""
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text, object_pairs_hook=_once)
        except ValueError:
            return yaml.load(text, RecipeLoader)  # which knows the line
    return yaml.load(text, RecipeLoader)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is written twice")
    return values


def _size(value: Any, known: dict[int, int]) -> int:
    """Values inside a value, itself included; one that contains itself has no size."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = LARGEST + 1  # until it is counted: whoever meets it inside itself
        known[id(value)] = 1 + sum(_size(v, known) for v in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without BOM.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(Problem(str(path), f"not UTF-8 text at byte {error.start}", "Save it as UTF-8.")) from error
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot be read: {error.strerror}", "Check the path.")) from error


def user_path(text: str, where: str) -> Path:
    """A path as a person wrote it, `~` expanded.

    Raises:
        InputError: no file can have that name, or `~name` is nobody's.
    """
    try:
        path = Path(text).expanduser()
        if "\0" in text:
            raise ValueError("it has a null character")
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        shown = text if len(text) <= 60 else f"{text[:60]}…"
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(Problem(where, f"{shown!r} cannot be a path: {reason}", "Check the path.")) from error
    return path
