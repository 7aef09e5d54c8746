"""The shared store: artifacts of many machines behind one URL, whole or absent there too.

One decision: the files of an artifact go first, into a folder named by their content, and its manifest is put last in
one piece. So what has a manifest is whole, two that deliver the same key never mix their files, and an object that was
damaged there is found by its sha256 before anything reads it. Nothing is locked here: see `flows.server_locks`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from registry.errors import InputError, Problem
from registry.store_url import VARIABLE, store_url
from tasks.artifacts import FORMAT, MANIFEST, Artifact, select
from tasks.digests import content_digest, sync

BLOCK_BYTES = 16 << 20  # asked for at once: one request each
SILENT_SECONDS = 60.0  # a store that did not answer is not asked again for so long
LONGEST_CAUSE = 200  # characters of what a library says went wrong
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory")  # a put is whole or absent there
VERSIONED = ("s3fs", "gcsfs")  # of which each release works with the release of fsspec of the same number only
REFUSALS = ("PermissionError", "NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError")

Progress = Callable[[int], None]


class Away(Exception):
    """The shared store does not answer, or says no; the run goes on without it."""


class Damaged(Exception):
    """What the shared store gave is not what its manifest says."""


class SharedStore:
    """The artifacts behind one URL.

    Args:
        url: from `store_url`.

    Raises:
        InputError: no package for this kind of URL, or fsspec does not know it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = _open(url)
        self._objects = url.partition("://")[0] in OBJECT_STORES
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._absent: set[tuple[str, str]] = set()
        self._refused: set[tuple[str, str]] = set()
        self._silent_until, self._why = 0.0, ""
        self._error: Exception | None = None
        self._notes: list[str] = []
        self._lock = threading.Lock()

    @property
    def mark(self) -> str:
        """A name for files that say what of a home is here already."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def known(self, step: str, key: str) -> dict[str, Any] | None:
        """The manifest of a key, as it was when it was last asked for; None also where the store does not answer."""
        if (step, key) in self._absent:
            return None
        try:
            return self.look(step, key)
        except Away:
            return None

    def look(self, step: str, key: str) -> dict[str, Any] | None:
        """The manifest of a key, asked for now unless it was found before; None when there is no whole one.

        Raises:
            Away: no answer.
        """
        if (step, key) in self._known:
            return self._known[step, key]
        found = None
        try:
            with self._asking():
                found = self._fs.cat_file(f"{self._folder(step, key)}/{MANIFEST}")
        except FileNotFoundError:
            self._absent.add((step, key))
            return None
        manifest = _read(found, step, key)
        if manifest is None and (step, key) not in self._absent:
            self._note(f"{self.url}: the manifest of {step} {key[:12]} is damaged; the step is made anew")
        if manifest is None or (key, str(manifest["digest"])) in self._refused:
            self._absent.add((step, key))
            return None
        self._absent.discard((step, key))
        self._known[step, key] = manifest
        return manifest

    def download(self, manifest: dict[str, Any], output: Path, told: Progress) -> None:
        """Write the files of an artifact and its manifest into an empty folder.

        Args:
            manifest: from `look`.
            output: becomes the artifact.
            told: gets bytes as they come; what it raises ends the download.

        Raises:
            Away: no answer.
            Damaged: a file is not there, or came twice with other bytes than its sha256 says; it is not believed again.
            OSError: it cannot be written here.
        """
        source = self._content(manifest)
        for file in manifest["files"]:
            target = output / file["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            # a second time, because bytes can also be lost on the way and a training takes longer than a download
            if not any(self._got(f"{source}/{file['path']}", target, file, told) for _ in range(2)):
                self.forget(manifest["step"], manifest["key"])
                self._refused.add((manifest["key"], str(manifest["digest"])))
                rule = "is missing or has other content than its sha256 says"
                raise Damaged(f"{file['path']} of {manifest['step']} {manifest['key'][:12]} in {self.url} {rule}")
            sync(target)
        (output / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        sync(output / MANIFEST)

    def _got(self, source: str, target: Path, file: dict[str, Any], told: Progress) -> bool:
        digest, size = hashlib.sha256(), 0
        try:
            with self._asking():
                remote = self._fs.open(source, "rb", block_size=BLOCK_BYTES)
            with remote, open(target, "wb") as local:
                while True:
                    with self._asking():
                        block = remote.read(BLOCK_BYTES)
                    if not block:
                        break
                    local.write(block)
                    digest.update(block)
                    size += len(block)
                    told(len(block))
        except FileNotFoundError:
            return False
        return (size, digest.hexdigest()) == (file["size"], file["sha256"])

    def upload(self, artifact: Artifact, told: Progress) -> None:
        """Put an artifact there, over what is there of its key.

        Args:
            artifact: a whole one.
            told: gets bytes as they go; what it raises ends the upload, and nothing half is believed.

        Raises:
            Away: no answer, or it was not taken.
        """
        target = self._content(artifact.manifest)
        with self._asking(missing=Away):
            if not self._objects:
                self._fs.info(self._root)  # as in `_probe`: what was mounted when the run began may be gone
            for name, (size, _) in artifact.files.items():
                self._put(artifact.path / name, f"{target}/{name}", told)
                told(size)
        self.put_manifest(artifact)

    def put_manifest(self, artifact: Artifact) -> None:
        """Put a manifest there, in one piece; the artifact's files are there.

        Raises:
            Away: no answer.
        """
        manifest = artifact.manifest
        folder, text = self._folder(manifest["step"], manifest["key"]), json.dumps(manifest, ensure_ascii=False)
        target = f"{folder}/{MANIFEST}"
        with self._asking(missing=Away):
            if self._objects:
                self._fs.pipe_file(target, text.encode())
            else:
                self._fs.makedirs(folder, exist_ok=True)
                part = f"{folder}/.{MANIFEST}.{time.time_ns()}"
                self._fs.pipe_file(part, text.encode())
                self._fs.mv(part, target)
        self._known[manifest["step"], manifest["key"]] = manifest

    def _put(self, source: Path, target: str, told: Progress) -> None:
        if not self._objects:
            self._fs.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        told(0)  # between two files is where an upload can be ended
        self._fs.put_file(str(source), target)

    def forget(self, step: str, key: str) -> None:
        """Look for a key anew when it is asked for again."""
        self._known.pop((step, key), None)

    def remove(self, step: str, key: str) -> None:
        """Take the manifest of a key away, so that nobody finds it any more.

        Raises:
            Away: no answer.
        """
        try:
            with self._asking():
                self._fs.rm_file(f"{self._folder(step, key)}/{MANIFEST}")
        except FileNotFoundError:
            self._absent.add((step, key))
        self.forget(step, key)

    def require_usable(self) -> None:
        """Ask once, before anything starts.

        Raises:
            InputError: it says that this person may not, or that there is no such bucket.
        """
        try:
            with self._asking():
                self._probe()
        except FileNotFoundError as error:
            rule = f"{self.url}: there is no such place"
            raise InputError(Problem(VARIABLE, rule, "Make the bucket or folder, or correct the URL.")) from error
        except Away as error:
            if type(error.__cause__).__name__ in REFUSALS:
                cure = "Set the credentials its library reads, such as AWS_ACCESS_KEY_ID; docs/shared-store.md"
                raise InputError(Problem(VARIABLE, f"{self.url} may not be read: {self._why}", cure)) from error

    def _probe(self) -> None:
        """List the first folder; in a bucket it is not there before somebody writes to it."""
        try:
            self._fs.ls(self._root)
        except FileNotFoundError:
            if not self._objects:  # not made: it would be on the disk under a mount point where nothing is mounted
                raise
            try:
                self._fs.ls(self._root.partition("/")[0])
            except PermissionError:  # there is a bucket, and this person may read a part of it
                return

    def tell(self, say: Callable[[str], None]) -> None:
        """Say what has gone wrong since this was last asked, each once."""
        with self._lock:
            notes, self._notes = self._notes, []
        for note in notes:
            say(note)

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)

    @contextmanager
    def _asking(self, missing: type[Exception] | None = None) -> Iterator[None]:
        """Within the body, what goes wrong in the library is `Away`; files that are not there, unless `missing`, and
        what ends a run are themselves."""
        if time.monotonic() < self._silent_until:
            raise Away(self._why) from self._error
        try:
            yield
        except FileNotFoundError as error:
            if missing is None:
                raise
            raise self._gone(error) from error
        except Exception as error:  # each library has its own errors, and none of them ends a run
            raise self._gone(error) from error
        self._why, self._silent_until = "", 0.0

    def _gone(self, error: Exception) -> Away:
        cause = (str(error).splitlines() or [""])[0][:LONGEST_CAUSE].rstrip(".")
        if not self._why:  # once, until it has answered again
            self._note(
                f"the shared store {self.url} cannot be used ({type(error).__name__}: {cause}); the run goes on "
                "without it, and what is made here is delivered by a later run"
            )
        self._why, self._error = f"{type(error).__name__}: {cause}", error
        self._silent_until = time.monotonic() + SILENT_SECONDS
        return Away(self._why)

    def _folder(self, step: str, key: str) -> str:
        return f"{self._root}/artifacts/{step}/{key}"

    def _content(self, manifest: dict[str, Any]) -> str:
        """Where the files of an artifact are: by all their content, that of `report/` included."""
        files = Artifact(Path(), manifest).files
        return f"{self._folder(manifest['step'], manifest['key'])}/{content_digest(files)[:16]}"


def shared_store() -> SharedStore | None:
    """The store that `LLAMATUNER_STORE` names, one for the whole process; None: none is named.

    Raises:
        InputError: the URL cannot be used, or a package is missing.
    """
    url = store_url()
    return _store_at(url) if url else None


@cache
def _store_at(url: str) -> SharedStore:
    return SharedStore(url)


def _open(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the path in it.

    Raises:
        InputError: there is none.
    """
    import fsspec
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = url.partition("://")[0]
    try:
        # what is listed or asked for is remembered in no process: another one may have changed it
        fs, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = str(known_implementations.get(scheme, {}).get("class", scheme)).partition(".")[0]
        wanted = f"{package}=={fsspec.__version__}" if package in VERSIONED else package
        cure = f"pip install {wanted}" if package != "fsspec" else str(error)
        raise InputError(Problem(VARIABLE, f"{url}: the package for {scheme}:// is not installed", cure)) from error
    except ValueError as error:
        rule = f"{url}: {str(error).splitlines()[0][:LONGEST_CAUSE]}"
        raise InputError(Problem(VARIABLE, rule, "Known: file, s3, gs, abfs and what else fsspec has.")) from error
    return fs, str(root).rstrip("/")


def _read(text: bytes, step: str, key: str) -> dict[str, Any] | None:
    """A manifest that can be believed; None for any other."""
    try:
        manifest = json.loads(text)
        files = Artifact(Path(), manifest).files
        said = (manifest["format"], manifest["step"], manifest["key"], manifest["digest"])
    except (ValueError, TypeError, KeyError):
        return None
    # names come from another machine: none may lead out of the artifact's folder
    inside = all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in files)
    right = said == (FORMAT, step, key, content_digest(select(files, ("*",))))
    return manifest if inside and right and MANIFEST not in files else None
