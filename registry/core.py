"""What is known by name: one typed, lazy registry.

One decision: a registry is filled by a function on first use, so importing it costs nothing, and is then frozen; two
entries of one name are an error when it is filled, and an unknown name is answered with the nearest ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
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
    """YAML as people expect it: `2e-4` is a number, a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML, but a repeated key is refused instead of the last one winning."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise yaml.MarkedYAMLError(
                    None, None, f"key {key!r} is written twice, first in line {seen[key]}", key_node.start_mark
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a signed exponent in a float; people write 2e-4 and 1E6.
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(text: str, where: str) -> Any:
    """YAML or JSON text as plain values.

    Raises:
        InputError: it does not parse, with line and column.
    """
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}" if mark else where
        raise InputError(Problem(place, f"not valid YAML or JSON: {error.problem or error.context}")) from error
    except yaml.YAMLError as error:
        raise InputError(Problem(where, f"not valid YAML or JSON: {error}")) from error
