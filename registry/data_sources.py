"""Data sets by name, by file, or by a user's `dataset_info.yaml` / `dataset_info.json`.

One decision: the vocabulary of an entry is LLaMA-Factory's and LLamaTuner's (`file_name`, `formatting`, `columns`,
`tags`), read as it is; an entry resolves to one `DataSource`, the only thing later steps see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from registry.core import Registry, read_text, read_yaml, user_path
from registry.errors import InputError, Problem, did_you_mean

SHIPPED = Path(__file__).with_name("datasets.yaml")
INFO_FILES = ("dataset_info.yaml", "dataset_info.yml", "dataset_info.json")
SUFFIXES = (".json", ".jsonl")
FORMATS = ("alpaca", "sharegpt", "openai")
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
CHAT = {"messages": "conversations", "system": "system", "tools": "tools"}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = TAGS | {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
}
ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "licence", "description", "num_samples")


@dataclass(frozen=True)
class DataSource:
    """A data set as later steps see it: files, and how a row is read."""

    name: str
    """For people; never part of a key."""
    file: Path
    formatting: str | None
    """`alpaca`, `sharegpt` or `openai`; None: found from the columns of the first row."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column name → the file's, where it differs from the format's own."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Role and content keys of a message, where they differ from the format's own."""
    num_samples: int | None = None
    """Most rows to take, in file order."""
    description: str = ""
    licence: str = ""


def _entries(path: Path) -> Iterator[tuple[str, DataSource]]:
    """The entries of one dataset_info file.

    Raises:
        InputError: every entry that cannot be used.
    """
    raw = read_yaml(read_text(path), str(path))
    if not isinstance(raw, dict):
        raise InputError(Problem(str(path), "a data set registry is a mapping of names to entries"))
    problems: list[Problem] = []
    sources = []
    for name, entry in raw.items():
        where = f"{path}: {name}"
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            # Hub entries of such a file are no error until one is asked for.
            continue
        unknown = [key for key in entry if key not in ENTRY_KEYS]
        problems += [Problem(f"{where}.{key}", "unknown key", did_you_mean(key, ENTRY_KEYS)) for key in unknown]
        formatting = entry.get("formatting", "alpaca")
        if formatting not in FORMATS:
            problems.append(
                Problem(f"{where}.formatting", f"unknown format {formatting!r}", did_you_mean(str(formatting), FORMATS))
            )
        wrong = _wrong_types(entry, where)
        problems += wrong
        if wrong:
            continue
        sources.append((name, _source(name, entry, path.parent)))
    if problems:
        raise InputError(problems, str(path))
    yield from sources


def _wrong_types(entry: dict[str, Any], where: str) -> list[Problem]:
    problems = []
    for key in ("columns", "tags"):
        value = entry.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            problems.append(Problem(f"{where}.{key}", f"{value!r} is not a mapping of names to names"))
    count = entry.get("num_samples")
    if count is not None and (type(count) is not int or count < 1):
        problems.append(Problem(f"{where}.num_samples", f"{count!r} is not a number of rows from 1"))
    return problems


def _source(name: str, entry: dict[str, Any], folder: Path) -> DataSource:
    return DataSource(
        name=name,
        file=folder / entry["file_name"],
        formatting=entry.get("formatting", "alpaca"),
        columns=entry.get("columns", {}),
        tags=entry.get("tags", {}),
        num_samples=entry.get("num_samples"),
        description=entry.get("description", ""),
        licence=entry.get("licence", ""),
    )


DATASETS: Registry[DataSource] = Registry("data set", lambda: _entries(SHIPPED))


def find_dataset(name: str, dataset_dir: Path | None, where: str) -> DataSource:
    """The data set a recipe means by a name.

    Looked up in order: an entry of the user's `dataset_dir`, a file in `dataset_dir`, a file by path, a shipped entry.

    Args:
        name: entry name or path.
        dataset_dir: the user's folder, or None.
        where: key path, for the error.

    Raises:
        InputError: nothing of that name, with the nearest; a file that is missing, empty or of an unknown kind.
    """
    known: list[str] = list(DATASETS)
    if dataset_dir is not None:
        entries = _user_entries(dataset_dir, where)
        known += list(entries)
        if name in entries:
            return _checked(entries[name], where)
        if user_path(str(dataset_dir / name), where).is_file():
            return _checked(DataSource(Path(name).stem, dataset_dir / name, None), where)
    path = user_path(name, where)
    if path.suffix in SUFFIXES or path.is_file():
        return _checked(DataSource(path.stem, path.absolute(), None), where)
    if name in DATASETS:
        return _checked(DATASETS[name], where)
    raise InputError(
        Problem(where, f"{name!r} is not a known data set and no such file exists", did_you_mean(name, known))
    )


def _user_entries(dataset_dir: Path, where: str) -> dict[str, DataSource]:
    if not dataset_dir.is_dir():
        raise InputError(Problem(where, f"dataset_dir {dataset_dir} is not a folder", "Check the path."))
    for info in INFO_FILES:
        if (dataset_dir / info).is_file():
            return dict(_entries(dataset_dir / info))
    return {}


def _checked(source: DataSource, where: str) -> DataSource:
    path = source.file
    if path.is_dir():
        raise InputError(Problem(where, f"{path} is a folder, not a file", "Name the data file in it."))
    if not path.is_file():
        near = [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else []
        close = get_close_matches(path.name, near, n=1)
        cure = f"Did you mean {path.parent / close[0]}?" if close else "Check the path."
        raise InputError(Problem(where, f"the file {path} does not exist", cure))
    if path.suffix not in SUFFIXES:
        raise InputError(Problem(where, f"{path} is not one of {', '.join(SUFFIXES)}", "Convert it to JSON lines."))
    if path.stat().st_size == 0:
        raise InputError(Problem(where, f"the file {path} is empty", "A data set needs at least one row."))
    return source
