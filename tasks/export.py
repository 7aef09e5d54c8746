"""export: a finished model as a folder that others can load.

One decision: the folder is written beside its place under a hidden name, read back, and renamed at the end, so that it
is whole or absent; and artifacts stay as they are. What a model is said to come from is written here, from manifests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from tasks.artifacts import BASE_RECORD, REPORT, Artifact, remove_folder
from tasks.digests import sha256_file, sync
from tasks.locks import try_lock
from tasks.tensor_files import (
    CODES,
    FLOATS,
    Tensor,
    commonest_dtype,
    difference,
    index_of,
    read_tensors,
    share_out,
    write_tensors,
)

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
INDEX = "{stem}.safetensors.index.json"
OWN_FILES = ("train.json", "merge.json", BASE_RECORD)  # what the steps write down for each other; the card says it
DTYPES = tuple(CODES)
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT_SHARD_SIZE = "5GB"
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]B)", re.IGNORECASE)
DAMAGED = "The artifact is damaged: remove its folder, and run the recipe again."
PARTIAL = ".llamatuner-partial"  # of the folder that is being written; what a killed export left is removed
SPARE_BYTES = 50_000_000  # for what is not weights, and for the file system itself

Told = Callable[[str, int, int], None]
"""Gets what is being done, and how many bytes of how many are."""


@dataclass(frozen=True)
class Further:
    """What else is written into a folder before it appears."""

    write: Callable[[Path], None]
    """Is given the folder; whatever it raises ends the export."""
    room: int
    """Bytes it takes."""


@dataclass(frozen=True)
class Exported:
    """A folder to be written."""

    artifact: Artifact
    """Of the step that made the model or the adapter."""
    target: Path
    """Absolute; is not there, or is empty."""
    dtype: str | None = None
    """Of the floating-point numbers in it; None: as the artifact has them."""
    max_shard_size: int | None = None
    """Most bytes of weights in one file; None: one file."""
    adapter_base: str | None = None
    """Hub id for `base_model_name_or_path` of an adapter; None: as the artifact has it."""

    @property
    def stem(self) -> str:
        """Name of the weights' files, without ending: peft and transformers look for these."""
        return "adapter_model" if (self.artifact.path / ADAPTER_CONFIG).exists() else "model"


def parse_dtype(text: str) -> str:
    """A dtype by its name or its usual short form.

    Raises:
        InputError: another word.
    """
    name = SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        known = [*DTYPES, *SHORT_DTYPES]
        raise InputError(Problem("--dtype", f"{text!r} is no dtype of saved weights", did_you_mean(text, known)))
    return name


def parse_size(text: str) -> int:
    """Bytes of a size as Hugging Face writes it.

    >>> parse_size("5GB"), parse_size("500 MB")
    (5000000000, 500000000)

    Raises:
        InputError: not a number with KB, MB, GB or TB behind it, or none that is more than 0.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    match = SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * units[match[2].upper()]) if match else 0
    if not size:
        cure = f"Did you mean {text.strip()}GB?" if text.strip().isdigit() else "E.g. 5GB or 500MB."
        raise InputError(Problem("--max-shard-size", f"{text!r} is not a size", cure))
    return size


def require_target(target: Path) -> None:
    """Refuse a folder that cannot appear as a whole.

    Raises:
        InputError: it is a file, is not empty, or is a place that cannot be renamed to.
    """
    where = f"--to {target}"
    if target.exists() and not target.is_dir():
        raise InputError(Problem(where, "is there and is no folder", "Name another folder."))
    if target.exists() and any(target.iterdir()):
        rule = "is there and is not empty; an export never writes over anything"
        raise InputError(Problem(where, rule, "Name another folder, or remove it first."))
    if os.path.ismount(target) or target == Path.cwd():
        rule = "is a mount point or the working folder; an export appears by one rename"
        raise InputError(Problem(where, rule, f"Name a folder in it, e.g. {target / 'model'}."))


def saved_dtype(artifact: Artifact) -> str:
    """The dtype that most of an artifact's weights are saved in.

    Raises:
        InputError: one that cannot be exported.
    """
    where = f"{artifact.step}/{artifact.path.name}"
    try:
        code = commonest_dtype(read_tensors(artifact.path))
    except ValueError as error:
        raise InputError(Problem(where, f"its weights cannot be read: {error}", DAMAGED)) from error
    if code not in FLOATS:
        rule = f"its weights are saved as {code or 'nothing'}"
        raise InputError(Problem(where, rule, f"What is {', '.join(FLOATS)} can be exported."))
    return FLOATS[code]


def export(wanted: Exported, card: str, home: Home, told: Told, further: Further | None = None) -> dict[str, int]:
    """Write the folder; its files and their bytes.

    Args:
        wanted: what and where.
        card: text of README.md.
        home: where the lock of the target lies.
        told: see `Told`.
        further: what else goes into it.

    Raises:
        InputError: a target that is not free, too little room, an artifact that is damaged, a dtype that cannot hold
            the numbers.
        OSError: the disk.
    """
    require_target(wanted.target)
    tensors = read_tensors(wanted.artifact.path)
    files = share_out(tensors, wanted.stem, wanted.max_shard_size, wanted.dtype)
    weights = sum(tensor.written_size(wanted.dtype) for tensor in tensors)
    partial = wanted.target.with_name(f".{wanted.target.name}{PARTIAL}")
    lock = home.locks / f"export-{hashlib.sha256(os.fsencode(wanted.target)).hexdigest()[:24]}.lock"
    with try_lock(lock) as free:
        if not free:
            raise InputError(Problem(f"--to {wanted.target}", "another export is writing it", "Wait for it."))
        try:
            wanted.target.parent.mkdir(parents=True, exist_ok=True)
            remove_folder(partial)  # left by an export that was killed
            _require_room(wanted.target.parent, weights + (further.room if further else 0))
            _require_whole(wanted.artifact, told)
            partial.mkdir()
            _write(wanted, partial, files, weights, card, told)
            _read_back(wanted, partial, files, weights, told)
            if further is not None:
                further.write(partial)
            sync(partial)
            partial.rename(wanted.target)
            sync(wanted.target.parent)
        except OverflowError as error:
            raise InputError(Problem(f"--dtype {wanted.dtype}", str(error), "Use bfloat16 or float32.")) from error
        finally:
            remove_folder(partial)
    return {path.relative_to(wanted.target).as_posix(): path.stat().st_size for path in _files(wanted.target)}


def _require_room(folder: Path, weights: int) -> None:
    free, needed = shutil.disk_usage(folder).free, weights + SPARE_BYTES
    if free < needed:
        rule = f"{free / 1e6:,.0f} MB free on its disk, {needed / 1e6:,.0f} MB needed"
        raise InputError(Problem(f"--to {folder}", rule, "Free space, or name a folder on another disk."))


def _counting(what: str, total: int, told: Told) -> Callable[[int], None]:
    """A function that is given the bytes done since its last call, and tells how many are done."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        told(what, done, total)

    return count


def _require_whole(artifact: Artifact, told: Told) -> None:
    """What goes out under an artifact's digest is what the digest says."""
    count = _counting("checking", artifact.size, told)
    for name, (_, sha) in artifact.files.items():
        if sha256_file(artifact.path / name, count) != sha:
            rule = f"{name} has other content than its sha256 says"
            raise InputError(Problem(f"{artifact.step}/{artifact.path.name}", rule, DAMAGED))


def _write(wanted: Exported, folder: Path, files: dict[str, list[Tensor]], weights: int, card: str, told: Told) -> None:
    count = _counting("writing", weights, told)
    for name, tensors in files.items():
        write_tensors(folder / name, tensors, wanted.dtype, count)
    if len(files) > 1:
        _write_json(folder / INDEX.format(stem=wanted.stem), index_of(files, wanted.dtype))
    for name in wanted.artifact.files:
        if name.startswith(REPORT) or not goes_out(name, wanted.artifact.files) or ".safetensors" in name:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wanted.artifact.path / name, folder / name)
    if dtype := wanted.dtype:
        _mend(folder / "config.json", lambda config: {"dtype": dtype} | _with_dtype(config, dtype))
    _mend(folder / ADAPTER_CONFIG, lambda config: _with_base(config, wanted.adapter_base))
    (folder / CARD).write_text(card, encoding="utf-8")
    for path in _files(folder):
        sync(path)


def goes_out(name: str, files: Container[str]) -> bool:
    """Whether an export has this one of an artifact's files; an adapter has to say which weights it belongs to."""
    return name not in OWN_FILES or (name == BASE_RECORD and ADAPTER_CONFIG in files)


def _mend(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a JSON file anew if that changes what it says."""
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        after = change(before)
        if after != before:
            _write_json(path, after)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A model's config, and those in it for its parts, with another dtype where they say one."""
    changed = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if config.get(key) in DTYPES}


def _with_base(config: dict[str, Any], name: str | None) -> dict[str, Any]:
    return config | ({"base_model_name_or_path": name} if name else {})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_back(wanted: Exported, folder: Path, files: dict[str, list[Tensor]], weights: int, told: Told) -> None:
    """Compare what was written with its source.

    Raises:
        OSError: they differ: the disk did not keep what it was given.
    """
    count = _counting("reading back", weights, told)
    for name, tensors in files.items():
        found = difference(folder / name, tensors, wanted.dtype, count)
        if found:
            raise OSError(f"{name} is not what was written: {found}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
