"""Data sets by name, path, URL, hub id or mapping.

One decision: what a person wrote is looked up in one order, and everything but the last step asks this machine only:
an entry of their own `dataset_dir`, a file there, a file by path, a shipped entry, a URL, a hub id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.core import Registry, read_text, read_yaml, user_path
from registry.data_entries import HUB_ID, INLINE_KEYS, MIXTURE_KEYS, name_of, source_of
from registry.data_files import find_files, kind_of, missing_file
from registry.data_sources import DataSource
from registry.errors import InputError, Problem, did_you_mean, shown

SHIPPED = Path(__file__).with_name("datasets.yaml")
INFO_FILES = ("dataset_info.yaml", "dataset_info.yml", "dataset_info.json")
PLACES = ("dataset", "file_name", "hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name", "om_hub_url")


@dataclass(frozen=True)
class Entry:
    """One entry of a dataset_info file, not judged yet."""

    name: str
    values: Mapping[str, Any]
    folder: Path | None
    """Where a relative `file_name` starts; None: the working directory."""
    where: str
    """File and name, or key path, for errors."""
    formatting: str | None = None
    """When it says none; None: found from the rows."""

    @property
    def description(self) -> str:
        """Its own words, its licence, and why it cannot be used where it cannot, for people."""
        licence = self.values.get("licence")
        return f"{self.values.get('description', '')}{f' [{licence}]' if licence else ''}"


def read_entries(path: Path) -> dict[str, Entry]:
    """The entries of a dataset_info file; none of them is judged.

    Raises:
        InputError: the file is not a mapping of names.
    """
    raw = read_yaml(read_text(path), str(path))
    if not isinstance(raw, dict):
        raise InputError(Problem(str(path), "a data set registry is a mapping of names to entries"))
    return {name: Entry(name, values, path.parent, f"{path}: {name}", "alpaca") for name, values in raw.items()}


def _shipped() -> Iterator[tuple[str, Entry]]:
    yield from read_entries(SHIPPED).items()


DATASETS: Registry[Entry] = Registry("data set", _shipped)


def find_dataset(wanted: str | Mapping[str, Any], dataset_dir: Path | None, where: str) -> DataSource:
    """The data set a recipe means.

    Args:
        wanted: entry name, path, folder, glob, URL or hub id; or a mapping of an entry's keys, of `dataset` (one of
            those texts, whose entry the other keys change), and of `weight`, `max_rows`, `repeat`.
        dataset_dir: the user's folder, or None.
        where: key path, for the error.

    Raises:
        InputError: nothing of that name, with the nearest; everything that is wrong with what was found.
    """
    if isinstance(wanted, str):
        return _judged(_named(wanted, dataset_dir, where))
    written = {key: value for key, value in wanted.items() if value is not None}
    own = {key: value for key, value in written.items() if key != "dataset"}
    if "dataset" in written:
        if not isinstance(written["dataset"], str):
            raise InputError(Problem(f"{where}.dataset", f"{shown(written['dataset'])} is not text"))
        taken = [key for key in PLACES[1:] if key in own]
        if taken:
            rule = f"dataset and {taken[0]} both say where the rows are"
            raise InputError(Problem(where, rule, f"Remove {taken[0]} or dataset."))
        found = _named(written["dataset"], dataset_dir, f"{where}.dataset")
        place = where if set(own) - set(MIXTURE_KEYS) else found.where
        return _judged(Entry(found.name, {**_mapping(found), **own}, found.folder, place, found.formatting))
    address = next((own[key] for key in PLACES if isinstance(own.get(key), str)), None)
    if address is None:
        unknown = [Problem(f"{where}.{key}", "unknown key", did_you_mean(key, INLINE_KEYS)) for key in own]
        named = [problem for problem, key in zip(unknown, own, strict=True) if key not in INLINE_KEYS]
        rule = "a mapping says where its rows are: dataset, file_name, hf_hub_url or ms_hub_url"
        raise InputError([*named, Problem(where, rule, "E.g. {dataset: NAME, max_rows: 1000}")])
    folder = dataset_dir if dataset_dir and _there(own.get("file_name"), dataset_dir, where) else None
    return source_of(name_of(address), own, folder, where)


def _there(file_name: Any, folder: Path, where: str) -> bool:
    return isinstance(file_name, str) and "://" not in file_name and find_files(file_name, folder, where) is not None


def _judged(entry: Entry) -> DataSource:
    return source_of(entry.name, _mapping(entry), entry.folder, entry.where, entry.formatting)


def _mapping(entry: Entry) -> Mapping[str, Any]:
    if not isinstance(entry.values, dict):
        raise InputError(Problem(entry.where, f"{shown(entry.values)} is not an entry: a mapping with file_name, …"))
    return entry.values


def _named(text: str, dataset_dir: Path | None, where: str) -> Entry:
    """The entry that a text means: one from a file, or one made for a path, a URL or a hub id.

    Raises:
        InputError: it means nothing.
    """
    entries = _own_entries(dataset_dir, where)
    if text in entries:
        return entries[text]
    if text.strip():
        local = _local(text, dataset_dir, where)
        if local is not None:
            return local
    if text in DATASETS:
        return DATASETS[text]
    if "://" in text:
        return Entry(name_of(text), {"file_name": text}, None, where)
    head, at, split = text.rpartition("@")
    if at and head:
        found = _named(head, dataset_dir, where)
        return Entry(found.name, {**_mapping(found), "split": split}, found.folder, where, found.formatting)
    hub = _hub(text, dataset_dir, where)
    if hub is not None:
        return hub
    known = [*DATASETS, *entries]
    rule = f"{text!r} is not a known data set and no such file exists"
    raise InputError(Problem(where, rule, did_you_mean(text, known)))


def _own_entries(dataset_dir: Path | None, where: str) -> dict[str, Entry]:
    if dataset_dir is None:
        return {}
    if not dataset_dir.is_dir():
        raise InputError(Problem(where, f"dataset_dir {dataset_dir} is not a folder", "Check the path."))
    return next((read_entries(dataset_dir / info) for info in INFO_FILES if (dataset_dir / info).is_file()), {})


def _local(text: str, dataset_dir: Path | None, where: str) -> Entry | None:
    """An entry for files of this machine; a bare word is a file only in `dataset_dir`, or with a suffix.

    Raises:
        InputError: files that cannot be used; nothing there, though it can be nothing else than a path.
    """
    folders = [dataset_dir] if dataset_dir else []
    if any(sign in text for sign in "/."):
        folders.append(Path.cwd())
    for folder in folders:
        if "://" not in text and find_files(text, folder, where) is not None:
            return Entry(name_of(str(folder / text)), {"file_name": text}, folder, where)
    user_path(text, where)
    is_path = kind_of(text) is not None or ("@" not in text and (text.startswith((".", "~", "/")) or "*" in text))
    if is_path and "://" not in text and text not in DATASETS:
        raise missing_file(text, dataset_dir, where)
    return None


def _hub(text: str, dataset_dir: Path | None, where: str) -> Entry | None:
    """An entry for `owner/name` or `owner/name:subset`; a shipped one of that repository says how its rows are read.

    Raises:
        InputError: it reads like a path below a folder that is there.
    """
    repo, _, subset = text.partition(":")
    if not HUB_ID.fullmatch(repo) or "/" not in repo or (":" in text and not subset):
        return None
    for folder in (dataset_dir, Path.cwd()):
        if folder and (folder / repo.split("/")[0]).is_dir():
            raise missing_file(text, folder, where)
    shipped = [entry for entry in DATASETS.values() if str(entry.values.get("hf_hub_url")).lower() == repo.lower()]
    values = dict(shipped[0].values) if len(shipped) == 1 else {"hf_hub_url": repo}
    if subset:
        values["subset"] = subset
    return Entry(f"{name_of(repo)}-{subset}" if subset else name_of(repo), values, None, where)
