"""Keys: the sha256 of canonical JSON.

One decision: a value the fingerprint does not know is an error, never `str(value)`. A permissive fallback puts
memory addresses, set orders or absolute paths into keys, and then nothing is ever reused, or the wrong thing is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Set
from typing import Any


def canonical(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON types with one spelling: sets sorted, tuples as lists, ints and floats kept apart.

    Args:
        value: None, bool, int, finite float, str, or list, tuple, set, mapping with str keys of these.
        where: the path to name in an error.

    Raises:
        TypeError: any other type, e.g. a `Path` (paths are runtime, not identity) or a function.
        ValueError: NaN or an infinity.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; a key needs finite numbers")
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{where} has the key {name!r}; a key needs mappings with str keys")
        return {name: canonical(value[name], f"{where}.{name}") for name in sorted(value)}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Set):
        return sorted((canonical(item, where) for item in value), key=canonical_json)
    raise TypeError(f"{where} is a {type(value).__name__}; make it str, int, float, bool, a list or a mapping")


def canonical_json(value: Any) -> str:
    """The one JSON text of a value.

    >>> canonical_json({"b": {2, 1}, "a": 1.0})
    '{"a":1.0,"b":[1,2]}'
    """
    return json.dumps(canonical(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 of `canonical_json(value)` as 64 hex digits; the errors are those of `canonical`."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()


def fingerprints(constant: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """`fingerprint(constant | more)` as a function of `more`, for many of them.

    >>> fingerprints({"b": 1, "d": 2})({"c": 3}) == fingerprint({"b": 1, "c": 3, "d": 2})
    True
    """

    def spelled(values: Mapping[str, Any]) -> dict[str, str]:
        return {name: f"{canonical_json(name)}:{canonical_json(value)}" for name, value in values.items()}

    known = spelled(constant)

    def of(more: Mapping[str, Any]) -> str:
        parts = known | spelled(more)
        return hashlib.sha256(f"{{{','.join(parts[name] for name in sorted(parts))}}}".encode()).hexdigest()

    return of
