"""Chunks: the unit in which data steps do, keep and share their work.

One decision: a finished chunk is a file under a key of its own, beside the artifacts, and an artifact links to it. So
rows added to a data set cost the new chunks only, a killed step goes on behind the last finished chunk, and two
recipes with a data set in common share its chunks, all by one rule.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from registry.home import Home
from tasks.digests import sha256_file, sync

Task = dict[str, Any]
Report = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """One chunk to make."""

    key: str
    """What it is made from: 64 hex digits."""
    task: Task
    """What its maker is told; plain JSON types."""
    payload: bytes = b""
    """Bytes that go with it, when they are in no file of their own."""
    source: Callable[[], bytes] | None = None
    """What gives the payload, when it is not read before the chunk is made."""

    def loaded(self) -> Chunk:
        """The same with its payload."""
        return replace(self, payload=self.source(), source=None) if self.source else self


@dataclass(frozen=True)
class Made:
    """A finished chunk."""

    path: Path
    size: int
    sha256: str
    report: Report
    """What its maker says about it: counts, rows left out."""
    reused: bool
    """It was there already."""


@dataclass(frozen=True)
class Maker:
    """A function that makes chunks of one kind, with all its settings loaded: `(task, payload, target) → report`."""

    make: Callable[[Task, bytes, Path], Report]

    @classmethod
    def load(cls, run: str, settings: dict[str, Any]) -> Maker:
        """The maker that `module:class` makes of settings."""
        module, name = run.split(":")
        return cls(getattr(import_module(module), name)(settings))


def make_chunk(maker: Maker, task: Task, payload: bytes, target: str) -> dict[str, Any]:
    """Make one chunk: the data file at `target`, then its description `<target>.json`, each whole or absent.

    Returns:
        The description: `size` (bytes), `sha256`, `report`.
    """
    path = Path(target)
    # two steps in threads of one process may make the same chunk at the same time
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        report = maker.make(task, payload, part)
        described = {"size": part.stat().st_size, "sha256": sha256_file(part), "report": report}
        sync(part)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    description = path.with_name(f"{path.name}.json")
    part.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    part.rename(description)
    return described


class ChunkCache:
    """The finished chunks of one kind of step.

    Args:
        home: where they are kept.
        kind: of the step, e.g. `render`.
        deep: believe a chunk only after reading it whole: what an artifact is rebuilt from after damage was found may
            be damaged as well.
    """

    def __init__(self, home: Home, kind: str, deep: bool = False) -> None:
        self.folder, self.deep = home.chunks / kind, deep
        self.folder.mkdir(parents=True, exist_ok=True)

    def target(self, key: str) -> Path:
        """Where the data file of a chunk is, or goes."""
        folder = self.folder / key[:2]
        folder.mkdir(exist_ok=True)
        return folder / key[2:42]

    def find(self, key: str) -> Made | None:
        """A finished chunk that is whole; None when it has to be made."""
        name = f"{self.folder}/{key[:2]}/{key[2:42]}"  # no Path before it is found: they are asked for by the thousand
        try:
            with open(f"{name}.json", "rb") as file:
                described = json.loads(file.read())
            size = os.stat(name).st_size
        except (FileNotFoundError, ValueError):  # ValueError: half a description, after a power cut
            return None
        path = Path(name)
        if size != described["size"] or (self.deep and sha256_file(path) != described["sha256"]):
            return None
        return Made(path, size, described["sha256"], described["report"], reused=True)


def make_chunk_of(cache: ChunkCache, key: str, make: Callable[[Task, bytes, Path], Report]) -> Made:
    """Make one chunk here and keep it."""
    target = cache.target(key)
    described = make_chunk(Maker(make), {}, b"", str(target))
    return Made(target, described["size"], described["sha256"], described["report"], reused=False)


def link(made: Made, target: Path) -> None:
    """Put a finished chunk into an artifact: a second name for the same bytes, or a copy where a disk has no such."""
    try:
        os.link(made.path, target)
    except OSError:  # no hard links on this file system, or too many of one file
        shutil.copyfile(made.path, target)


def remove_unused(home: Home, going: Iterable[Path] = (), dry_run: bool = False) -> tuple[int, int]:
    """Remove the chunks that no artifact has; to be called while nothing runs.

    Args:
        home: where they are.
        going: folders whose links do not count: they are about to be removed.
        dry_run: remove nothing.

    Returns:
        How many, and their bytes.
    """
    let_go = Counter(_inode(path) for folder in going for path in folder.rglob("*") if path.is_file())
    count = size = 0
    for path in _data_files(home):
        found = path.stat()
        if found.st_nlink - let_go[_inode(path)] > 1:
            continue
        count, size = count + 1, size + found.st_size
        if not dry_run:
            _remove(path)
    return count, size


def forget(home: Home, folder: Path) -> None:
    """Remove the chunks that an artifact links to: it was found damaged, and they are the same bytes."""
    shared = {_inode(path) for path in folder.rglob("*") if path.is_file()}
    for path in _data_files(home):
        if _inode(path) in shared:
            _remove(path)


def _data_files(home: Home) -> list[Path]:
    return [path for path in home.chunks.rglob("*") if path.is_file() and path.suffix != ".json"]


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _remove(path: Path) -> None:
    path.with_name(f"{path.name}.json").unlink(missing_ok=True)  # first: a description alone is no chunk either
    path.unlink()
