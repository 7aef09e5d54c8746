"""A step: a function of a record and of artifacts, and the rules by which it is done once.

One decision: the key of a step is computed from settings and *content* digests of its inputs, and the step is
looked up, locked, looked up again, made, and taken in, all here, without Prefect. Prefect's task around it only
orders, retries and shows; so a run in which nothing is to do needs no server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from registry.home import Home
from tasks.artifacts import MANIFEST, Artifact, Store, remove_folder, select, weights_digest
from tasks.digests import DigestMemory, content_digest
from tasks.fingerprint import fingerprint
from tasks.launch import run_program
from tasks.launchers.choice import end_left, launcher_for
from tasks.launchers.job import Cluster
from tasks.locks import check_stop, locked
from tasks.manifests import RECORDED, manifest_of
from tasks.nodes import Nodes
from tasks.program import Spec
from tasks.sharing import deliver, fetch, known, offered, tell
from tasks.slots import Wanted, devices_for
from tasks.versions import package_versions

DATA_STEPS = ("model", "download", "fetch", "render", "tokenize")  # kinds of those that come before any training
RESUME_FILE = "report/resume.json"


@dataclass(frozen=True)
class LocalFolder:
    """A folder of the user's that serves as an input as it stands, e.g. a local base model."""

    path: Path


@dataclass(frozen=True)
class Input:
    """An input of a step: what another step made, or a local folder; or the part of it that matters."""

    source: Step | LocalFolder
    part: tuple[str, ...] = ("*",)
    """Patterns of the files that count; a change elsewhere in the input leaves the key as it is."""


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: what to run on what. Making one runs nothing."""

    stage: str
    """Stage it belongs to, e.g. `sft`; `base` for what belongs to the base model."""
    name: str
    """Name shown in plans; unique within its stage, e.g. `fetch` or `fetch:held_out`."""
    version: int
    """Raised when the code changes what comes out for equal settings and inputs."""
    label: str
    """Name for people, in front of the key in the artifact's folder."""
    identity: dict[str, Any]
    """Settings that change the result; plain JSON types."""
    inputs: dict[str, Input]
    """Input name → where it comes from."""
    run: str
    """`module:function`, imported when the step is made."""
    runtime: dict[str, Any] = field(default_factory=dict)
    """Settings that do not change the result."""
    packages: tuple[str, ...] = ()
    """Packages whose version changes the bytes and therefore enters the key."""
    devices: int = 0
    """Devices that it computes on, which are shared out (see `tasks.slots`); 0: it needs none."""
    memory: str = ""
    """`module:function` that says of a `Ready` step how many bytes of each device it takes; empty: all of them."""
    cluster: Cluster | None = None
    """Where its program runs; None: on this machine."""
    strict_versions: bool = False
    """Let the recorded package versions (torch, transformers …) enter the key as well."""

    @property
    def kind(self) -> str:
        """What it does, without what it does it to: `fetch` of `fetch:held_out`. Folder name and part of the key."""
        return self.name.split(":")[0]

    @property
    def title(self) -> str:
        """`stage/name`."""
        return f"{self.stage}/{self.name}"


@dataclass(frozen=True)
class Ready:
    """A step whose inputs are all there."""

    key: str
    paths: dict[str, Path]
    digests: dict[str, str]
    payload: dict[str, Any]
    """What the key is the fingerprint of."""


@dataclass
class Work:
    """What a step's function gets: its settings, its inputs, where to write, whom to tell."""

    step: Step
    inputs: dict[str, Path]
    digests: dict[str, str]
    output: Path
    """Becomes the artifact."""
    scratch: Path
    """Survives a crash; removed with success."""
    home: Home
    stop: threading.Event
    emit: Callable[[dict[str, Any]], None]
    packages: dict[str, str] = field(default_factory=dict)
    """Versions that are part of the key."""
    rebuilding: bool = False
    """The artifact was there and damaged; what it was made of may be damaged as well."""
    known: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Output files whose size and sha256 are known already."""
    devices: tuple[str, ...] = ()
    """UUIDs of those it was given."""

    @property
    def identity(self) -> dict[str, Any]:
        """The step's settings."""
        return self.step.identity

    def note(self, text: str) -> None:
        """Tell the person something."""
        self.emit({"kind": "note", "text": text})

    def progress(self, done: int, total: int, unit: str) -> None:
        """Tell how far it is, and stop here when asked to.

        Raises:
            Interrupted: the run was asked to stop.
        """
        check_stop(self.stop)
        self.emit({"kind": "progress", "step": done, "total": total, "unit": unit})

    def counter(self, rows: Iterable[int]) -> Callable[[Any], None]:
        """A function that counts on by the next of `rows` at each call, for `make_chunks`."""
        sizes = list(rows)
        counts = iter(accumulate(sizes))
        return lambda _: self.progress(next(counts), sum(sizes), "rows")

    def spec(self, base_digest: bool = False) -> Spec:
        """The spec of a program that does this step.

        Args:
            base_digest: tell the program the digest of the weights of its input `base`, which goes with what it makes.
        """
        folder = self.scratch.parent
        told = {}
        if base_digest:
            told = {"base_digest": weights_digest(self.inputs["base"], DigestMemory(self.home.digests))}
        return Spec(
            settings=self.identity | told,
            runtime=self.step.runtime,
            inputs={name: str(path) for name, path in self.inputs.items()},
            output=str(self.output),
            scratch=str(self.scratch),
            events=str(folder / "events.jsonl"),
            failure=str(folder / "failure.json"),
            devices=list(self.devices),
        )

    @property
    def folder(self) -> Path:
        """Where spec, log and events of a program lie."""
        return self.scratch.parent

    def run(self, module: str, spec: Spec | None = None, processes: int = 1, nodes: Nodes | None = None) -> None:
        """Run a program to its end, where the step's programs run; see `run_program`."""
        launcher = launcher_for(self.step.cluster)
        given = (spec or self.spec(), self.folder, self.emit, self.stop, processes)
        run_program(module, *given, nodes=nodes, launcher=launcher)


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    state: str
    """`cached` or `ran`."""
    artifact: Artifact
    seconds: float
    resumed_from: int | None = None
    """Optimizer step, or finished chunks, that an interrupted attempt had reached."""


def requirement(step: Step, name: str, store: Store, memory: DigestMemory) -> tuple[Path, str] | None:
    """Folder and digest of one input; None while the step that makes it is not done."""
    return _found(step.inputs[name], store, memory)


def input_digest(wanted: Input, store: Store, memory: DigestMemory) -> str | None:
    """The digest of an input; None while the step that makes it is not done."""
    found = _found(wanted, store, memory)
    return found[1] if found else None


def _found(wanted: Input, store: Store, memory: DigestMemory) -> tuple[Path, str] | None:
    if isinstance(wanted.source, LocalFolder):
        files = memory.files(wanted.source.path, wanted.part)
        files.pop(MANIFEST, None)  # of an artifact that serves as a folder: no content
        return wanted.source.path, content_digest(select(files, wanted.part))
    ready = prepare(wanted.source, store, memory)
    artifact = known(store, wanted.source.kind, ready.key) if ready else None
    return (artifact.path, artifact.part_digest(wanted.part)) if artifact else None


def prepare(step: Step, store: Store, memory: DigestMemory) -> Ready | None:
    """The key of a step and its inputs; None while one of its inputs is not there."""
    found = {name: requirement(step, name, store, memory) for name in step.inputs}
    present = {name: value for name, value in found.items() if value is not None}
    if len(present) < len(found):
        return None
    digests = {name: digest for name, (_, digest) in present.items()}
    packages = step.packages + (RECORDED if step.strict_versions else ())
    payload = {
        "step": step.kind,
        "step_version": step.version,
        "identity": step.identity,
        "inputs": digests,
        "packages": package_versions(sorted(set(packages))),
    }
    return Ready(fingerprint(payload), {name: path for name, (path, _) in present.items()}, digests, payload)


def behind(step: Step, *names: str) -> Step:
    """The step that an input of an input … comes from."""
    for name in names:
        source = step.inputs[name].source
        assert isinstance(source, Step)
        step = source
    return step


def do(
    step: Step,
    store: Store,
    memory: DigestMemory,
    stop: threading.Event,
    emit: Callable[[dict[str, Any]], None],
    here: bool = True,
) -> Outcome:
    """Make a step's artifact, unless it is there.

    Args:
        step: the step; every step it depends on is done.
        emit: gets events with a `kind`: `note`, `progress`, `metrics`.
        here: bring it to this home when only the shared store has it.

    Raises:
        InputError, ProgramFailed, OSError: as the step's function does; nothing half-made is left as an artifact.
        Interrupted: `stop` was set.
    """
    started = time.monotonic()
    ready = prepare(step, store, memory)
    if ready is None:
        raise RuntimeError(f"{step.title}: an input is not there; an artifact was removed while the pipeline ran")
    artifact, lock = store.find(step.kind, ready.key), store.lock_path(ready.key)
    if artifact and not store.work_folder(step.kind, ready.key).exists():
        deliver(store, artifact, stop, emit)
        return Outcome("cached", artifact, time.monotonic() - started)
    say = _saying(emit)
    if artifact is None and store.shared:
        artifact = offered(store, step.kind, ready.key)
        tell(store, say)
        if artifact and here:
            with locked(lock, stop, say):
                artifact = store.find(step.kind, ready.key) or fetch(store, step.kind, ready.key, stop, emit)
        if artifact:
            return Outcome("cached", artifact, time.monotonic() - started)
        for wanted in step.inputs.values():
            if isinstance(wanted.source, Step):  # which may be elsewhere only, or made anew if it cannot be fetched
                do(wanted.source, store, memory, stop, emit)
        again = prepare(step, store, memory)
        if again is None or again.key != ready.key:  # an input came out with other bytes
            return do(step, store, memory, stop, emit, here)
        ready = again
    with locked(lock, stop, say):
        return _settle(step, store, ready, stop, emit)


def _settle(
    step: Step, store: Store, ready: Ready, stop: threading.Event, emit: Callable[[dict[str, Any]], None]
) -> Outcome:
    """Find or make what a key says, under its lock; the inputs are in this home."""
    started, say = time.monotonic(), _saying(emit)
    folder = store.work_folder(step.kind, ready.key)
    artifact = store.find(step.kind, ready.key)
    if artifact:
        remove_folder(folder)  # left by a kill between the step's last rename and its clean-up
        deliver(store, artifact, stop, emit)
        return Outcome("cached", artifact, time.monotonic() - started)
    damaged = store.set_aside_if_damaged(step.kind, ready.key)
    with store.across(ready.key, stop, say) if store.shared else nullcontext():
        artifact = fetch(store, step.kind, ready.key, stop, emit)  # made by another machine while this one waited
        if artifact:
            return Outcome("cached", artifact, time.monotonic() - started)
        if damaged:
            say(f"made again, because the artifact was damaged: {damaged}")
        work = _open_work(step, store, ready, stop, emit, bool(damaged))
        with _slot(step, ready, store.home, stop, say) as work.devices:
            started = time.monotonic()  # waiting for others is not this step's time
            counts = _named(step.run)(work) or {}
        manifest = manifest_of(step, ready, counts, time.monotonic() - started)
        artifact = store.commit(step.kind, step.label, manifest, work.output, work.known)
        remove_folder(work.folder)
        seconds = time.monotonic() - started
        deliver(store, artifact, stop, emit, ask=False)
        tell(store, say)
    return Outcome("ran", artifact, seconds, counts.get("resumed_from"))


def _saying(emit: Callable[[dict[str, Any]], None]) -> Callable[[str], None]:
    return lambda text: emit({"kind": "note", "text": text})


def _open_work(
    step: Step,
    store: Store,
    ready: Ready,
    stop: threading.Event,
    emit: Callable[[dict[str, Any]], None],
    rebuilding: bool,
) -> Work:
    folder = store.work_folder(step.kind, ready.key)
    if not end_left(folder, step.cluster.launcher if step.cluster else None):
        remove_folder(folder / "output")
    (folder / "output").mkdir(parents=True, exist_ok=True)
    (folder / "scratch").mkdir(exist_ok=True)
    return Work(
        step,
        ready.paths,
        ready.digests,
        folder / "output",
        folder / "scratch",
        store.home,
        stop,
        emit,
        ready.payload["packages"],
        rebuilding,
    )


def _slot(
    step: Step, ready: Ready, home: Home, stop: threading.Event, say: Callable[[str], None]
) -> AbstractContextManager[tuple[str, ...]]:
    """The devices a step was given, for as long as it computes."""
    if not step.devices:
        return nullcontext(())
    memory = _named(step.memory)(step, ready) if step.memory else None
    return devices_for(home.locks / "devices", Wanted(step.title, step.devices, memory), stop, say)


def _named(function: str) -> Callable[..., Any]:
    module, name = function.split(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def upstream(steps: list[Step]) -> Iterator[Step]:
    """Every step needed for the given ones, inputs first, each once."""
    seen: set[int] = set()

    def visit(step: Step) -> Iterator[Step]:
        if id(step) in seen:
            return
        seen.add(id(step))
        for wanted in step.inputs.values():
            if isinstance(wanted.source, Step):
                yield from visit(wanted.source)
        yield step

    for step in steps:
        yield from visit(step)


def require_folder(path: Path, where: str) -> None:
    """Refuse an input folder that is not there.

    Raises:
        InputError: naming the key of the recipe.
    """
    if not path.is_dir():
        raise InputError(Problem(where, f"{path} is not a folder", "Check the path."))
