"""What a home and the shared store give each other: artifacts found, fetched and delivered.

One decision: the home is where everything is read and made, the shared store is only asked and told. An artifact comes
whole into a work folder and is taken in by the same rename as one that was made here. What the shared store has from
here is marked in the home, and whoever meets an artifact without a mark delivers it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.artifacts import Artifact, Store, remove_folder
from tasks.locks import Interrupted, check_stop, locked
from tasks.shared_store import Away, Damaged, SharedStore

Say = Callable[[str], None]
Emit = Callable[[dict[str, Any]], None]


def known(store: Store, step: str, key: str) -> Artifact | None:
    """The whole artifact of a key, wherever it is; what the shared store said before is not asked again."""
    artifact = store.find(step, key)
    if artifact or store.shared is None:
        return artifact
    return _elsewhere(store, store.shared.known(step, key))


def offered(store: Store, step: str, key: str) -> Artifact | None:
    """What the shared store has of a key now; None also where it does not answer, which is said later."""
    if store.shared is None:
        return None
    try:
        return _elsewhere(store, store.shared.look(step, key))
    except Away:
        return None


def _elsewhere(store: Store, manifest: dict[str, Any] | None) -> Artifact | None:
    if manifest is None:
        return None
    folder = store.folder(manifest["step"], manifest["label"], manifest["key"])
    return Artifact(folder, manifest, here=False)


def fetch(store: Store, step: str, key: str, stop: threading.Event, emit: Emit) -> Artifact | None:
    """Bring an artifact from the shared store into this home. Call under the lock of the key.

    Returns:
        It; None when the shared store does not have it whole, or does not answer.

    Raises:
        InputError: the disk is too small for it.
        Interrupted: `stop` was set.
        OSError: it cannot be written.
    """
    found, shared = offered(store, step, key), store.shared
    if found is None or shared is None:
        return None
    store.home.require_free(found.size)
    emit({"kind": "note", "text": f"fetching {found.size / 1e6:,.1f} MB from the shared store"})
    output = store.work_folder(step, key) / "output"
    remove_folder(output)
    output.mkdir(parents=True)
    try:
        shared.download(found.manifest, output, _counter(found.size, stop, emit))
    except (Away, Damaged) as error:
        remove_folder(output)
        emit({"kind": "note", "text": f"not fetched, and made here instead: {error}"})
        return None
    damaged = store.set_aside_if_damaged(step, key)
    if damaged:
        emit({"kind": "note", "text": f"fetched, because the artifact here was damaged: {damaged}"})
    artifact = store.take(step, found.manifest["label"], found.manifest, output)
    remove_folder(output.parent)  # with what an earlier attempt to make it here has left
    _mark(store, shared, artifact)
    return artifact


def brought(store: Store, step: str, key: str) -> Artifact | None:
    """The whole artifact of a key in this home, fetched if only the shared store has it; for what runs no steps.

    Raises:
        InputError: the disk is too small for it.
    """
    artifact = store.find(step, key)
    if artifact or store.shared is None:
        return artifact
    with locked(store.lock_path(key)):
        return store.find(step, key) or fetch(store, step, key, threading.Event(), lambda event: None)


def deliver(store: Store, artifact: Artifact, stop: threading.Event, emit: Emit, ask: bool = True) -> None:
    """Make sure that the shared store has an artifact; whatever is in the way is said, and the next run tries again.

    Args:
        store: with or without a shared store.
        artifact: a whole one of its home.
        stop: ends the delivery; the artifact stays to be delivered.
        emit: gets notes and progress.
        ask: whether the store has it already; False when it is known that it has none that is whole.
    """
    shared = store.shared
    if shared is None or (ask and _marked(store, shared, artifact).exists()):
        return
    try:
        if not ask or shared.look(artifact.step, artifact.key) is None:
            shared.upload(artifact, _counter(artifact.size, stop, emit))
    except Away:  # it has noted why; see `tell`
        return
    except Interrupted:
        emit({"kind": "note", "text": "stopped before the shared store had it all; the next run delivers it"})
        return
    _mark(store, shared, artifact)


def update(store: Store, artifact: Artifact) -> None:
    """Deliver what was added to a manifest, where the artifact is delivered already."""
    shared = store.shared
    if shared is not None and _marked(store, shared, artifact).exists():
        try:
            shared.put_manifest(artifact)
        except Away:  # it has noted why; what was added is a link only
            return


def withdraw(store: Store, artifact: Artifact) -> None:
    """Take an artifact out of the shared store, which holds something that is not right any more.

    Raises:
        OSError: the store does not answer.
    """
    shared = store.shared
    if shared is None:
        return
    try:
        shared.remove(artifact.step, artifact.key)
    except Away as error:
        raise OSError(f"{shared.url} does not answer: {error}") from error
    _marked(store, shared, artifact).unlink(missing_ok=True)


def tell(store: Store, say: Say) -> None:
    """Say what went wrong with the shared store, each once."""
    if store.shared is not None:
        store.shared.tell(say)


def undelivered(store: Store, artifact: Artifact) -> bool:
    """Whether the shared store may lack an artifact of this home."""
    return store.shared is not None and not _marked(store, store.shared, artifact).exists()


def _marked(store: Store, shared: SharedStore, artifact: Artifact) -> Path:
    return store.home.delivered / shared.mark / artifact.key


def _mark(store: Store, shared: SharedStore, artifact: Artifact) -> None:
    path = _marked(store, shared, artifact)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _counter(total: int, stop: threading.Event, emit: Emit) -> Callable[[int], None]:
    """Counts bytes, tells how far it is, and stops when asked to."""
    done = 0

    def told(count: int) -> None:
        nonlocal done
        check_stop(stop)
        done += count
        if count:
            emit({"kind": "progress", "step": done, "total": total, "unit": "bytes"})

    return told
