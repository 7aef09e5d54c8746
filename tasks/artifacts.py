"""The store: artifacts that are whole or absent.

One decision: `manifest.json` is written last into a private work folder and the folder is then renamed into
place, so a folder under `artifacts/` with a manifest is a finished step, and everything else is not. `report/` in
an artifact (logs, curves, timings, rows left out) is kept and checked but is not part of the digest: what hangs on an
artifact depends on its content only.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.home import Home
from tasks.digests import DigestMemory, content_digest, sha256_file, sync

if TYPE_CHECKING:
    from tasks.shared_store import SharedStore

FORMAT = 1  # layout of manifest.json
MANIFEST = "manifest.json"
WEIGHTS = ("*.safetensors",)
BASE_RECORD = "base.json"  # beside every adapter and model: the digest of the base weights it was made on
REPORT = "report/"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact, as its manifest describes it."""

    path: Path
    manifest: dict[str, Any]
    here: bool = True
    """Its files are in `path`; else they are in the shared store only, and `path` is where they would go."""

    @property
    def key(self) -> str:
        """What it was made from: 64 hex digits."""
        return str(self.manifest["key"])

    @property
    def digest(self) -> str:
        """What it is: the digest of its content, 64 hex digits."""
        return str(self.manifest["digest"])

    @property
    def step(self) -> str:
        """The step that made it."""
        return str(self.manifest["step"])

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """Relative path → (bytes, sha256), `report/` included."""
        return {file["path"]: (file["size"], file["sha256"]) for file in self.manifest["files"]}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def part_digest(self, patterns: Iterable[str]) -> str:
        """Digest of the files that match, e.g. `("tokenizer*", "*.jinja")`."""
        return content_digest(select(self.files, patterns))


def select(files: dict[str, tuple[int, str]], patterns: Iterable[str]) -> dict[str, tuple[int, str]]:
    """The files whose relative path matches one of the patterns; `report/` never does."""
    wanted = tuple(patterns)
    return {
        name: value
        for name, value in files.items()
        if not name.startswith(REPORT) and any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    }


def damage(artifact: Artifact, deep: bool = False) -> str | None:
    """What is wrong with an artifact's files, or None.

    Args:
        artifact: the one to check.
        deep: read every file and compare sha256, not sizes only.
    """
    for name, (size, sha) in artifact.files.items():
        path = artifact.path / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if deep and sha256_file(path) != sha:
            return f"{name} has other content than its sha256 says"
    return None


Across = Callable[[str, threading.Event, Callable[[str], None]], AbstractContextManager[None]]
"""Holds the lock of a key among all machines: key, what ends the wait, who is told that it waits."""


def on_this_machine(key: str, stop: threading.Event, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """No lock among machines: two of them may make the same at the same time, each whole, and one is kept."""
    return nullcontext()


class Store:
    """Finds, takes in, sets aside and lists artifacts of one home.

    Args:
        home: whose.
        across: the lock of a key among the machines that share a store; asked for only where there is one.
    """

    def __init__(self, home: Home, across: Across = on_this_machine) -> None:
        self.home, self.across = home, across

    def folder(self, step: str, label: str, key: str) -> Path:
        """Where an artifact goes: the name for people first, the key last."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:60] or "unnamed"
        return self.home.artifacts / step / f"{name}-{key[:12]}"

    def work_folder(self, step: str, key: str) -> Path:
        """Where an unfinished step works; it survives a crash."""
        return self.home.work / f"{step}-{key[:12]}"

    @cached_property
    def shared(self) -> SharedStore | None:
        """The store that other machines have a part in, see `tasks.sharing`; None: this home is alone.

        Raises:
            InputError: it is named and cannot be used.
        """
        from tasks.shared_store import shared_store  # which is made of what is here

        return shared_store()

    def lock_path(self, key: str) -> Path:
        """The lock of a key."""
        return self.home.locks / f"{key[:32]}.lock"

    def find(self, step: str, key: str) -> Artifact | None:
        """The whole artifact of a key, by sizes; None when there is none. A damaged one is not returned."""
        artifact = self._at_key(step, key)
        return artifact if artifact and damage(artifact) is None else None

    def set_aside_if_damaged(self, step: str, key: str) -> str | None:
        """Move a damaged or half-deleted artifact of this key to `damaged/`; the reason, or None.

        Call under the lock of the key.
        """
        for path in (self.home.artifacts / step).glob(f"*-{key[:12]}"):
            artifact = read_artifact(path)
            reason = "manifest.json is missing or unreadable" if artifact is None else damage(artifact)
            if reason:
                self.home.damaged.mkdir(parents=True, exist_ok=True)
                path.rename(self.home.damaged / f"{step}-{path.name}-{time.time_ns()}")
                return f"{path.name}: {reason}"
        return None

    def commit(
        self,
        step: str,
        label: str,
        manifest: dict[str, Any],
        output: Path,
        known: Mapping[str, tuple[int, str]] | None = None,
    ) -> Artifact:
        """Turn a finished output folder into the artifact of its key.

        Args:
            step: the step's name.
            label: the name for people.
            manifest: everything but `format`, `files` and `digest`, which are filled in here.
            output: the folder to take; it is renamed away.
            known: files whose (bytes, sha256) are known and which are on the disk already.
        """
        files = {}
        for path in sorted(output.rglob("*")):
            name = path.relative_to(output).as_posix()
            if known and name in known:
                files[name] = known[name]
            elif path.is_file():
                sync(path)
                files[name] = (path.stat().st_size, sha256_file(path))
        whole = manifest | {
            "format": FORMAT,
            "digest": content_digest(select(files, ("*",))),
            "files": [{"path": name, "size": size, "sha256": sha} for name, (size, sha) in files.items()],
        }
        text = json.dumps(whole, ensure_ascii=False, indent=1)
        (output / f".{MANIFEST}").write_text(text, encoding="utf-8")
        sync(output / f".{MANIFEST}")
        (output / f".{MANIFEST}").rename(output / MANIFEST)
        return self.take(step, label, whole, output)

    def take(self, step: str, label: str, manifest: dict[str, Any], output: Path) -> Artifact:
        """Put a folder that is whole, manifest included, in its place; it is renamed away."""
        target = self.folder(step, label, manifest["key"])
        target.parent.mkdir(parents=True, exist_ok=True)
        output.rename(target)
        sync(target.parent)
        return Artifact(target, manifest)

    def all(self) -> Iterator[Artifact]:
        """Every artifact with a readable manifest, whole or not, newest first."""
        found = [read_artifact(path) for path in self.home.artifacts.glob("*/*") if path.is_dir()]
        yield from sorted((a for a in found if a), key=lambda a: str(a.manifest.get("created", "")), reverse=True)

    def annotate(self, artifact: Artifact, **fields: Any) -> Artifact:
        """Add what is known only afterwards (the MLflow run id) to a manifest; digest and key stay."""
        manifest = artifact.manifest | fields
        temporary = artifact.path / f".{MANIFEST}.{os.getpid()}"
        temporary.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        temporary.rename(artifact.path / MANIFEST)
        return replace(artifact, manifest=manifest)

    def _at_key(self, step: str, key: str) -> Artifact | None:
        for path in (self.home.artifacts / step).glob(f"*-{key[:12]}"):
            artifact = read_artifact(path)
            if artifact and artifact.key == key:
                return artifact
        return None


def read_artifact(path: Path) -> Artifact | None:
    """The artifact in a folder, or None when it has no readable manifest of this format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return Artifact(path, manifest) if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def weights_digest(folder: Path, memory: DigestMemory) -> str:
    """Digest of the weights of a model, whatever else lies in its folder: what an adapter belongs to."""
    artifact = read_artifact(folder)
    return content_digest(select(artifact.files if artifact else memory.files(folder, WEIGHTS), WEIGHTS))


def remove_folder(path: Path) -> None:
    """Remove a folder that may not be there."""
    if path.exists():
        shutil.rmtree(path)
