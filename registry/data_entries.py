"""An entry of a dataset_info file, or a mapping in a recipe, to a `DataSource`.

One decision: an entry is judged when somebody asks for it, never when the file it stands in is read: those files are
shared, and most of their entries are of no interest to a run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from registry.data_files import KNOWN_SUFFIXES, find_files, is_data, kind_of, missing_file
from registry.data_sources import COLUMNS, FORMATS, MEDIA, TAG_NAMES, DataSource, Remote, parse_split
from registry.errors import InputError, Problem, did_you_mean, shown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TEXTS = (
    *("file_name", "hf_hub_url", "ms_hub_url", "subset", "split", "folder", "revision"),
    *("licence", "description", "unusable"),
)
REFUSED = {
    "om_hub_url": "the Modelers hub is not supported",
    "script_url": "a dataset script is a program that would run here; data files are read, scripts never",
    "cloud_file_name": "cloud storage is not supported",
}
"""Places of data that are refused when an entry has no other, and why."""
MIXTURE_KEYS = ("weight", "max_rows", "repeat")
ENTRY_KEYS = (*TEXTS, *REFUSED, "formatting", "ranking", "num_samples", "columns", "tags")
INLINE_KEYS = ("dataset", *ENTRY_KEYS, *MIXTURE_KEYS)


def source_of(
    name: str, entry: Mapping[str, Any], folder: Path | None, where: str, formatting: str | None = None
) -> DataSource:
    """What an entry means.

    Args:
        name: of the entry, for people.
        entry: as written; values of null count as not written.
        folder: where a relative `file_name` starts; None: the working directory.
        where: file and name, or key path, for errors.
        formatting: when the entry says none; None: found from the rows, unless it names columns.

    Raises:
        InputError: everything that is wrong with it.
    """
    problems = _wrong_values(entry, where)
    if problems:
        raise InputError(problems)
    entry = {key: value for key, value in entry.items() if value is not None}
    columns = {key: value for key, value in entry.get("columns", {}).items() if value}
    tags = {key: value for key, value in entry.get("tags", {}).items() if value}
    if "formatting" not in entry and ("messages" in columns or tags):
        rule = "columns.messages and tags belong to conversations, and formatting is alpaca when it is not written"
        raise InputError(Problem(f"{where}.formatting", rule, "Write formatting: sharegpt or formatting: openai."))
    own = formatting or ("alpaca" if columns or entry.get("ranking") else None)
    split, rows = parse_split(entry["split"], f"{where}.split") if "split" in entry else (None, None)
    remote, files = _place(entry, split, folder, where)
    return DataSource(
        name=safe_name(name),
        files=files,
        remote=remote,
        formatting=entry.get("formatting", own),
        ranking=entry.get("ranking", False),
        columns=columns,
        tags=tags,
        num_samples=entry.get("num_samples"),
        slice=rows,
        weight=float(entry.get("weight", 1.0)),
        max_rows=entry.get("max_rows"),
        repeat=entry.get("repeat", 1),
        licence=entry.get("licence", ""),
        description=entry.get("description", ""),
    )


def safe_name(text: str) -> str:
    """A name that can be part of a file name: what stands for other characters is a dash.

    >>> safe_name("data/*.jsonl")
    'data-.jsonl'
    """
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "data"


def name_of(address: str) -> str:
    """A short name for a file, a folder, a glob, a URL or a hub id.

    >>> name_of("/data/rows.jsonl.gz"), name_of("https://host/a/x.csv?v=1"), name_of("owner/name"), name_of("a/*.csv")
    ('rows', 'x', 'name', 'a')
    """
    path = unquote(urlsplit(address).path) if "://" in address else address
    parts = [part for part in path.split("/") if part and not set(part) & set("*?[")]
    last = parts[-1] if parts else path
    kind = kind_of(last)
    return last[: -len("".join(kind))] if kind else last


def _wrong_values(entry: Mapping[str, Any], where: str) -> list[Problem]:
    """Everything in an entry that is not what its key holds."""
    problems = [
        Problem(f"{where}.{key}", "unknown key", did_you_mean(str(key), INLINE_KEYS))
        for key in entry
        if key not in INLINE_KEYS
    ]
    for key in TEXTS:
        if entry.get(key) is not None and not isinstance(entry[key], str):
            problems.append(Problem(f"{where}.{key}", f"{shown(entry[key])} is not text"))
    formatting = entry.get("formatting")
    if formatting is not None and formatting not in FORMATS:
        cure = did_you_mean(str(formatting), FORMATS)
        problems.append(Problem(f"{where}.formatting", f"unknown format {formatting!r}", cure))
    if not isinstance(entry.get("ranking") or False, bool):
        problems.append(Problem(f"{where}.ranking", f"{shown(entry['ranking'])} is not true or false"))
    for key in ("num_samples", "max_rows", "repeat"):
        count = entry.get(key)
        if count is not None and (type(count) is not int or count < 1):
            problems.append(Problem(f"{where}.{key}", f"{shown(count)} is not a number of rows from 1"))
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        problems.append(Problem(f"{where}.weight", f"{shown(weight)} is not a number above 0"))
    return problems + _wrong_names(entry, "columns", COLUMNS, where) + _wrong_names(entry, "tags", TAG_NAMES, where)


def _wrong_names(entry: Mapping[str, Any], key: str, known: Any, where: str) -> list[Problem]:
    """What is wrong with `columns` or `tags`."""
    value = entry.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(text, str | None) for text in value.values()):
        return [Problem(f"{where}.{key}", f"{value!r} is not a mapping of names to names")]
    problems = []
    for name in value:
        place = f"{where}.{key}.{name}"
        if name in MEDIA and key == "columns" and value[name]:
            rule = f"{name} are data of other kinds than text, which no model here reads"
            problems.append(Problem(place, rule, "Use a data set of text alone."))
        elif name not in known and name not in MEDIA:
            problems.append(Problem(place, "unknown key", did_you_mean(str(name), list(known))))
    return problems


def _place(
    entry: Mapping[str, Any], split: str | None, folder: Path | None, where: str
) -> tuple[Remote | None, tuple[Path, ...]]:
    """Where the files of an entry are: on a hub, behind a URL, here; a hub comes first, as in LLaMA-Factory.

    Raises:
        InputError: nowhere, or in a place that is refused.
    """
    if "unusable" in entry:
        raise InputError(Problem(where, str(entry["unusable"]), "Convert the rows, and name the file."))
    at = {"subset": entry.get("subset"), "split": split, "folder": entry.get("folder")}
    for key, kind in (("hf_hub_url", "hub"), ("ms_hub_url", "modelscope")):
        address = entry.get(key)
        if address is not None:
            if not HUB_ID.fullmatch(address):
                raise InputError(Problem(f"{where}.{key}", f"{address!r} is not a hub id", "It is owner/name."))
            return Remote(kind, address, revision=entry.get("revision"), **at), ()  # type: ignore[arg-type]
    for key, reason in REFUSED.items():
        if entry.get(key) is not None and "file_name" not in entry:
            cure = "Name the data files: file_name for a file, a folder or a URL, hf_hub_url for a repository."
            raise InputError(Problem(f"{where}.{key}", reason, cure))
    address = entry.get("file_name")
    if address is None:
        rule = "it says nowhere where its files are"
        raise InputError(Problem(where, rule, "Give it file_name, hf_hub_url or ms_hub_url."))
    _refuse_repository_keys(entry, split, where)
    if "://" in address:
        return Remote("url", _url(address, where)), ()
    files = find_files(address, folder, where)
    if files is None:
        raise missing_file(address, folder, where)
    return None, files


def _refuse_repository_keys(entry: Mapping[str, Any], split: str | None, where: str) -> None:
    """Refuse what only a repository has.

    Raises:
        InputError: each such key.
    """
    problems = [
        Problem(f"{where}.{key}", f"a file has no {key}", "Remove it, or name a repository with hf_hub_url.")
        for key in ("subset", "folder", "revision")
        if entry.get(key) is not None
    ]
    if split not in (None, "train"):
        rule = f"files have no splits, so none is named {split!r}"
        problems.append(Problem(f"{where}.split", rule, "Name the files of the split."))
    if problems:
        raise InputError(problems)


def _url(address: str, where: str) -> str:
    """The URL of a data file.

    Raises:
        InputError: another protocol, a password in it, or a name that is no data file's.
    """
    parts = urlsplit(address)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        rule = f"{address!r} is not a URL that can be read"
        raise InputError(Problem(where, rule, "It starts with https:// or http://; download other files first."))
    if parts.username or parts.password:
        clean = f"{parts.scheme}://…@{parts.hostname}{parts.path}"
        rule = f"{clean} has a user name or password in it, which would be kept with the run"
        raise InputError(Problem(where, rule, "Download the file, and name it."))
    if not is_data(unquote(parts.path)):
        rule = f"the path of {address} ends in none of {KNOWN_SUFFIXES}"
        raise InputError(Problem(where, rule, "Name the URL of the data file itself."))
    return address
