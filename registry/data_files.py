"""Which files are data: kinds by suffix, folders, globs.

One decision: the kind of a file is its name's, compression included, and nothing else is looked at; what cannot be
read as data (scripts, weights, archives) is never taken, also not out of a folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from glob import has_magic, iglob
from pathlib import Path, PurePosixPath

from registry.core import user_path
from registry.errors import InputError, Problem

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSIONS = (".gz", ".xz", ".zst")
# JSON files that describe a data set or a model and hold no row
DESCRIPTIONS = frozenset(
    f"{name}.json"
    for name in (
        *("dataset_info", "dataset_infos", "dataset_dict", "state"),
        *("config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map"),
    )
)
KNOWN_SUFFIXES = f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"


def kind_of(name: str) -> tuple[str, str] | None:
    """Kind and compression of a data file, by its name; None for any other file.

    >>> kind_of("rows.JSONL.gz"), kind_of("rows.parquet"), kind_of("rows.py")
    (('.jsonl', '.gz'), ('.parquet', ''), None)
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in KINDS else None


def is_data(name: str) -> bool:
    """Whether a file of this name holds rows."""
    base = PurePosixPath(name).name
    return kind_of(base) is not None and base not in DESCRIPTIONS and not base.startswith(".")


def find_files(text: str, folder: Path | None, where: str) -> tuple[Path, ...] | None:
    """The data files that a path, a folder or a glob names, sorted; None when nothing of that name is there.

    Args:
        text: as a person wrote it.
        folder: where a relative path starts; None: the working directory.
        where: key path, for the error.

    Raises:
        InputError: a file that is empty or of an unknown kind, a folder without data files, a glob that matches none.
    """
    written = user_path(text, where)
    path = user_path(str(folder / written), where) if folder else written.absolute()
    if path.is_dir():
        return _checked(_in_folder(path, where), where)
    if path.is_file():
        return _checked([path], where)
    if has_magic(text):
        matches = sorted(Path(match) for match in iglob(str(path), recursive=True) if not os.path.isdir(match))
        found = [match for match in matches if is_data(match.name)]
        if matches and not found:
            raise InputError(Problem(where, f"no file that {path} matches is one of {KNOWN_SUFFIXES}"))
        return _checked(found, where) if found else None
    return None


def _in_folder(path: Path, where: str) -> list[Path]:
    """The data files of a folder.

    Raises:
        InputError: there is none.
    """
    found = sorted(file for file in path.iterdir() if file.is_file() and is_data(file.name))
    if not found:
        below = next((file for file in sorted(path.rglob("*")) if file.is_file() and is_data(file.name)), None)
        rule = f"the folder {path} holds no data file ({KNOWN_SUFFIXES})"
        cure = f"Write {path}/**/*{below.suffix} for the files in its folders." if below else "Name the data files."
        raise InputError(Problem(where, rule, cure))
    return found


def missing_file(text: str, folder: Path | None, where: str) -> InputError:
    """The error for a path that must be a file and is not there."""
    written = user_path(text, where)
    path = folder / written if folder else written.absolute()
    if has_magic(text):
        return InputError(Problem(where, f"no file matches {path}", "Check the pattern; ** goes into folders."))
    near = [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else []
    close = get_close_matches(path.name, near, n=1)
    cure = f"Did you mean {path.parent / close[0]}?" if close else "Check the path."
    return InputError(Problem(where, f"the file {path} does not exist", cure))


def _checked(paths: Iterable[Path], where: str) -> tuple[Path, ...]:
    """The same paths.

    Raises:
        InputError: every one that is empty or of an unknown kind.
    """
    problems = []
    for path in paths:
        if kind_of(path.name) is None:
            problems.append(Problem(where, f"{path} is not one of {KNOWN_SUFFIXES}", "Convert it to JSON lines."))
        elif path.stat().st_size == 0:
            problems.append(Problem(where, f"the file {path} is empty", "A data set needs at least one row."))
    if problems:
        raise InputError(problems)
    return tuple(paths)
