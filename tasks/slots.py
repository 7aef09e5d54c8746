"""Devices of this machine, shared out among the steps of all runs of a home.

One decision: a claim is a file that its holder keeps locked, as in `tasks.locks`: the kernel frees it however that one
ends. Who came first is served first, so a step that needs all devices is not passed for ever by those that need one.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.devices import Device, cuda_devices
from tasks.locks import POLL_SECONDS, check_stop, locked

MIB = 2**20
MARGIN, MARGIN_MIB = 1.1, 1024.0  # what is held beside an estimate; CUDA and its libraries hold some for each process
PROCESSORS = Device("cpu", "the processors", (0, 0), 0)
"""Where there is no CUDA device: a step takes them whole, as two side by side would take as long as one by one."""


@dataclass(frozen=True)
class Wanted:
    """What a step asks for."""

    title: str
    devices: int = 1
    """Devices it computes on; more than there are: all of them."""
    memory: float | None = None
    """Bytes of each of them; None: all, nobody else is let in."""


def pool() -> tuple[Device, ...]:
    """What is shared out: the visible CUDA devices, or the processors.

    Slices of a device (MIG) are not told apart: they are given out as one.
    """
    devices = cuda_devices()
    apart = len({device.uuid for device in devices}) == len(devices) and "MIG-" not in _visible()
    return (devices if apart else devices[:1]) or (PROCESSORS,)


def _visible() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def seen_devices(taken: Sequence[str]) -> dict[str, str]:
    """Variables with which a program sees the devices it was given, and nothing where it was given all.

    Args:
        taken: their UUIDs; none where nobody shares devices out.
    """
    every = [device.uuid for device in pool()]
    return {} if not taken or set(taken) >= set(every) else {"CUDA_VISIBLE_DEVICES": ",".join(taken)}


def choose(
    devices: Sequence[Device], held: Mapping[str, Sequence[float | None]], wanted: Wanted
) -> tuple[str, ...] | None:
    """The devices for a step; None while it has to wait.

    Args:
        devices: all there are.
        held: UUID → MiB that others have of it, None for all of it.
        wanted: what is asked for.

    >>> one, two = (Device(f"GPU-{n}", "L4", (8, 9), 24000) for n in "ab")
    >>> choose([one, two], {"GPU-a": [9000.0]}, Wanted("sft/train", memory=8000 * MIB))
    ('GPU-b',)
    >>> choose([one, two], {"GPU-a": [9000.0], "GPU-b": [None]}, Wanted("sft/train", memory=8000 * MIB))
    ('GPU-a',)
    """
    count, needed = min(wanted.devices, len(devices)), mebibytes(wanted)
    free = [device for device in devices if not held.get(device.uuid)]
    beside = [
        device
        for device in devices
        if needed is not None and (others := held.get(device.uuid)) and _fits(device.memory_mib, others, needed)
    ]
    found = (free + beside)[:count]
    return tuple(device.uuid for device in devices if device in found) if len(found) == count else None


def _fits(size: int, others: Sequence[float | None], needed: float) -> bool:
    return None not in others and sum(each for each in others if each is not None) + needed <= size


def mebibytes(wanted: Wanted) -> float | None:
    """What a step is counted with: its estimate and the margin."""
    return None if wanted.memory is None else wanted.memory / MIB * MARGIN + MARGIN_MIB


@dataclass(frozen=True)
class _Claim:
    """What one file says."""

    file: Path
    title: str
    process: int
    devices: tuple[str, ...]
    """Empty while it waits."""
    memory: float | None
    """MiB of each of them."""


@contextmanager
def devices_for(
    folder: Path, wanted: Wanted, stop: threading.Event | None, say: Callable[[str], None]
) -> Iterator[tuple[str, ...]]:
    """Hold devices for the body.

    Args:
        folder: of the claims; all who share the devices use the same.
        wanted: what is asked for.
        stop: ends the wait with `Interrupted`.
        say: told once who is waited for.

    Yields:
        The UUIDs of the devices; `seen_devices` makes a program see these alone.

    Raises:
        Interrupted: `stop` was set while waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gate = folder / "gate.lock"  # held for milliseconds, by whoever looks at claims or changes one
    with locked(gate, stop):
        file, descriptor = _queue(folder, wanted)
    try:
        said = False
        while True:
            with locked(gate, stop):
                others = [claim for claim in _claims(folder) if claim.file != file]
                found = _turn(others, file, wanted)
                if found:
                    _write(descriptor, wanted, found)
                    break
            if not said:
                say(_waited_for(others))
                said = True
            check_stop(stop)
            time.sleep(POLL_SECONDS)
        yield found
    finally:
        file.unlink()
        os.close(descriptor)


def _queue(folder: Path, wanted: Wanted) -> tuple[Path, int]:
    """A new claim behind all others, and its locked descriptor."""
    last = max((int(path.name.split("-")[0]) for path in folder.glob("*.claim")), default=0)
    file = folder / f"{last + 1:09d}-{os.getpid()}.claim"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _write(descriptor, wanted, ())
    return file, descriptor


def _write(descriptor: int, wanted: Wanted, devices: tuple[str, ...]) -> None:
    values = {"title": wanted.title, "pid": os.getpid(), "devices": devices, "mib": mebibytes(wanted)}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(values).encode(), 0)


def _claims(folder: Path) -> list[_Claim]:
    """The claims of the living, in their order; those of the dead are removed."""
    found = []
    for file in sorted(folder.glob("*.claim")):
        try:
            claim = open(file, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            continue  # its holder has just done with it
        with claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
                file.unlink(missing_ok=True)  # nobody holds it
            except BlockingIOError:
                values = json.loads(claim.read())
                found.append(_Claim(file, values["title"], values["pid"], tuple(values["devices"]), values["mib"]))
    return found


def _turn(others: Sequence[_Claim], own: Path, wanted: Wanted) -> tuple[str, ...] | None:
    """The devices, if nobody who came earlier still waits and there are enough."""
    if any(not claim.devices and claim.file.name < own.name for claim in others):
        return None
    held: dict[str, list[float | None]] = {}
    for claim in others:
        for uuid in claim.devices:
            held.setdefault(uuid, []).append(claim.memory)
    return choose(pool(), held, wanted)


def _waited_for(others: Sequence[_Claim]) -> str:
    """For people."""
    holders = [f"{claim.title} of process {claim.process}" for claim in others if claim.devices]
    waiting = sum(not claim.devices for claim in others)
    what = "a device" if pool() != (PROCESSORS,) else "the processors"
    queue = f"; {waiting} wait too" if waiting else ""
    return f"waiting for {what}: {', '.join(holders) or 'those who came before'}{queue}"
