"""Which files of a data set repository are which subset and split.

One decision: what the repository declares (`configs` in the head of its README.md) counts; where it declares nothing,
names do, by the words `datasets` knows; and where neither says which files are meant, the error lists what there is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from registry.data_files import KINDS, KNOWN_SUFFIXES, is_data, kind_of
from registry.errors import InputError, Problem, did_you_mean

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(?:.*/)?data/(?P<split>[\w.]+(?:-[\w.]+)*?)-\d{5}-of-\d{5}[^/]*")
CONVERTED = re.compile(r"(?P<subset>[^/]+)/(?:partial-)?(?P<split>[^/]+)/\d{4}\.parquet")  # refs/convert/parquet
BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
Splits = dict[str, list[str]]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a repository."""

    repo: str
    subset: str | None
    split: str | None
    folder: str | None
    where: str
    """Key of the recipe, for errors."""

    def refuse(self, rule: str, cure: str) -> InputError:
        """The error that something asked for is not there."""
        return InputError(Problem(self.where, f"{self.repo} {rule}", cure))


def choose_files(names: Iterable[str], readme: str | None, wanted: Wanted) -> list[str]:
    """The data files to download, sorted by name.

    Args:
        names: every file of the repository, with its folders.
        readme: text of README.md; None: there is none.
        wanted: subset, split and folder.

    Raises:
        InputError: no data files, or none of that subset or split; it lists those there are.
    """
    # a name that leads out of the repository is nobody's data file
    everything = sorted(name for name in names if not name.startswith("/") and ".." not in PurePosixPath(name).parts)
    data = [name for name in everything if is_data(name)]
    if not data:
        raise _no_data(everything, wanted)
    if wanted.folder:
        folder = wanted.folder.strip("/") + "/"
        data = [name for name in data if name.startswith(folder)]
        if not data:
            folders = sorted({str(PurePosixPath(name).parent) for name in everything if is_data(name)} - {"."})
            cure = f"Folders with data: {', '.join(folders)}" if folders else "Its files lie in no folder."
            raise wanted.refuse(f"has no data file in the folder {wanted.folder!r}", cure)
    splits = _splits(data, declared_configs(readme), wanted)
    return _one_kind(_chosen(splits, wanted))


def declared_configs(readme: str | None) -> list[dict[str, Any]]:
    """`configs` of a README's head that say where data files are; an unreadable head declares nothing."""
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(?:\n|$)", readme or "", re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return []
    configs = head.get("configs") if isinstance(head, dict) else None
    found = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    return [config for config in found if config.get("data_files") or config.get("data_dir")]


def _no_data(names: Sequence[str], wanted: Wanted) -> InputError:
    scripts = [name for name in names if name.endswith(".py")]
    if scripts:
        cure = "revision: refs/convert/parquet often holds its rows as Parquet; else download and convert them."
        return wanted.refuse(f"has a dataset script ({scripts[0]}) and no data files; scripts are never run", cure)
    return wanted.refuse(f"has no data file ({KNOWN_SUFFIXES})", "Check the name.")


def _splits(data: list[str], configs: list[dict[str, Any]], wanted: Wanted) -> Splits:
    """Split → files of the subset that is wanted.

    Raises:
        InputError: no such subset, or several and none is named.
    """
    if configs and not wanted.folder:
        config = _config(configs, wanted)
        folder = str(config.get("data_dir") or "").strip("/")
        inside = [name for name in data if not folder or name.startswith(f"{folder}/")]
        if not config.get("data_files"):
            return _by_names(inside)
        splits: Splits = {}
        for split, patterns in _patterns(config["data_files"]).items():
            rules = [pattern_rule(f"{folder}/{pattern}" if folder else pattern) for pattern in patterns]
            splits[split] = [name for name in data if any(rule.fullmatch(name) for rule in rules)]
        return {split: names for split, names in splits.items() if names}
    converted = [match for match in map(CONVERTED.fullmatch, data) if match]
    if len(converted) == len(data):
        return _converted(converted, wanted)
    if wanted.subset is None:
        return _by_names(data)
    inside = [name for name in data if wanted.subset in PurePosixPath(name).parts[:-1]]
    inside = inside or [name for name in data if _stem(name) == wanted.subset]
    if not inside:
        folders = sorted({part for name in data for part in PurePosixPath(name).parts[:-1]})
        raise _no_subset(wanted, [*folders, *sorted({_stem(name) for name in data})])
    return _by_names(inside)


def _config(configs: list[dict[str, Any]], wanted: Wanted) -> dict[str, Any]:
    named = {str(config.get("config_name", "default")): config for config in configs}
    if wanted.subset is not None:
        if wanted.subset not in named:
            raise _no_subset(wanted, list(named))
        return named[wanted.subset]
    default = [config for config in configs if config.get("default") is True]
    if default or "default" in named or len(named) == 1:
        return default[0] if default else named.get("default", configs[0])
    raise wanted.refuse(f"has {len(named)} subsets and no default", f"Name one with subset: {', '.join(sorted(named))}")


def _converted(matches: list[re.Match[str]], wanted: Wanted) -> Splits:
    subsets = sorted({match["subset"] for match in matches})
    subset = wanted.subset or (subsets[0] if len(subsets) == 1 else "default")
    if subset not in subsets:
        raise _no_subset(wanted, subsets)
    splits: Splits = {}
    for match in matches:
        if match["subset"] == subset:
            splits.setdefault(match["split"], []).append(match[0])
    return splits


def _no_subset(wanted: Wanted, subsets: list[str]) -> InputError:
    what = f"has no subset {wanted.subset!r}" if wanted.subset else "has several subsets"
    near = did_you_mean(wanted.subset or "", subsets)
    listed = f"Subsets: {', '.join(sorted(subsets)[:30])}"
    return wanted.refuse(what, f"{near} {listed}" if near.startswith("Did") else listed)


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split → patterns, from any of the forms `data_files` has."""
    if isinstance(data_files, Mapping):
        return {str(split): _texts(patterns) for split, patterns in data_files.items()}
    if isinstance(data_files, list) and all(isinstance(item, Mapping) for item in data_files):
        return {str(item.get("split", "train")): _texts(item.get("path", [])) for item in data_files}
    return {"train": _texts(data_files)}


def _texts(value: Any) -> list[str]:
    return [str(item).removeprefix("./") for item in (value if isinstance(value, list) else [value])]


def pattern_rule(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression: `*` and `?` stay in their folder, `**` goes into folders.

    >>> rule = pattern_rule("data/**/x-*.csv")
    >>> [bool(rule.fullmatch(name)) for name in ("data/x-1.csv", "data/a/b/x-1.csv", "data/x-1/y.csv")]
    [True, True, False]
    """
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    known |= {part: part.replace("[!", "[^") for part in parts if part.startswith("[") and part.endswith("]")}
    return re.compile("".join(known[part] if part in known else re.escape(part) for part in parts))


def _by_names(data: list[str]) -> Splits:
    """Split → files, by the words in their folders and names; files without such a word are `train`."""
    shards = {name: match["split"] for name in data if (match := SHARD.fullmatch(name))}
    if shards:
        return _grouped(shards)
    for place in (lambda name: PurePosixPath(name).parts[:-1], lambda name: (_stem(name),)):
        found = {name: split for name in data if (split := _split_word(place(name)))}
        if found:
            return _grouped(found)
    return {"train": data}


def _split_word(texts: Iterable[str]) -> str | None:
    words = {word for text in texts for word in BETWEEN_WORDS.split(text.lower())}
    return next((split for split, known in WORDS.items() if words & set(known)), None)


def _grouped(splits: Mapping[str, str]) -> Splits:
    grouped: Splits = {}
    for name, split in splits.items():
        grouped.setdefault(split, []).append(name)
    return grouped


def _chosen(splits: Splits, wanted: Wanted) -> list[str]:
    """The files of the split that is wanted.

    Raises:
        InputError: there is no such split, or no `train` among several and none is named.
    """
    listed = f"Splits: {', '.join(sorted(splits)) or 'none with files'}"
    if wanted.split is not None:
        if wanted.split not in splits:
            near = did_you_mean(wanted.split, list(splits))
            cure = f"{near} {listed}" if near.startswith("Did") else listed
            raise wanted.refuse(f"has no split {wanted.split!r}", cure)
        return splits[wanted.split]
    if "train" in splits:
        return splits["train"]
    if len(splits) != 1:
        raise wanted.refuse("has no split 'train'", f"Name one with split. {listed}")
    return next(iter(splits.values()))


def _one_kind(names: list[str]) -> list[str]:
    """The files of one kind: a repository that has several holds the same rows in each. Text comes last: notes."""
    kinds = Counter(kind[0] for name in names if (kind := kind_of(name)))
    best = max(kinds, key=lambda kind: (kind != ".txt", kinds[kind], -KINDS.index(kind)))
    return [name for name in names if (kind := kind_of(name)) and kind[0] == best]


def _stem(name: str) -> str:
    base, kind = PurePosixPath(name).name, kind_of(name)
    return base[: -len("".join(kind))] if kind else base
