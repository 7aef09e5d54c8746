"""The child side of a launched program: what `python -m tasks.….program SPEC` does before and after its work.

One decision: a program talks to the task that launched it through files only (a spec read, events appended,
a failure written), never through pipes. Files survive a kill, cannot block a writer, and can be read afterwards.
Standard output and error go to a log file that the task opens.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.errors import InputError
from registry.home import Home

PR_SET_PDEATHSIG = 1
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
)  # CUDA's words, PyTorch's, the kernel's
FULL_BYTES = 1_000_000  # a disk with less is full: less than any weight file or database page cache needs
# Packages that libraries import wherever they are installed, and few programs need, or none. With kernels they fetch
# code from a hub and run it, without asking.
OPTIONAL = {"bitsandbytes", "deepspeed", "datasets", "kernels", "pandas", "scipy", "sklearn"}
LAUNCHER_PID = "LLAMATUNER_LAUNCHER_PID"  # set by tasks.launch, so that a child can tell that its launcher is gone


@dataclass(frozen=True)
class Spec:
    """What a program is told: one JSON file.

    `settings` is the step's identity, `runtime` what does not change the result. Paths are absolute.
    """

    settings: dict[str, Any]
    """The step's identity, as in its manifest."""
    runtime: dict[str, Any]
    """Logging interval, checkpoint interval, batch size of evaluation, threads …"""
    inputs: dict[str, str]
    """Input name → folder of the artifact (or local model)."""
    output: str
    """Folder that becomes the artifact; `output/report/` holds what is not part of its digest."""
    scratch: str
    """Folder that survives a crash and is removed with success: checkpoints live here."""
    events: str
    """JSON lines the program appends to; the task follows them."""
    failure: str
    """Where the cause of a failure is written, as `{"kind", "message"}`."""
    devices: list[str] = field(default_factory=list)
    """UUIDs of those it was given; empty: it computes on none, or nobody shares them out."""

    @classmethod
    def read(cls, path: str | Path) -> Spec:
        """Read a spec written by `tasks.launch`."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


class ProgramError(Exception):
    """A failure whose cause is known.

    Args:
        kind: `bad_setting`, `not_finite`, `disk_full`, `out_of_memory`, `killed` or `unexpected`; retries are decided
            by it.
        message: the value, the rule, the cure.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Events:
    """Appends events for the launching task; of several ranks on a machine only the first one writes.

    Every event is one JSON line with a `kind`: `progress` (`step`, `total`, and numbers to show), `metrics`
    (`step`, `values`), `note` (`text`).
    """

    def __init__(self, path: str | Path) -> None:
        first_rank = os.environ.get("LOCAL_RANK", "0") == "0"
        # lives as long as the program
        self._file = open(path, "a", encoding="utf-8") if first_rank else None  # noqa: SIM115

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event and flush it."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._file.flush()

    def note(self, text: str) -> None:
        """Tell the person something."""
        self.emit("note", text=text)


class Timings:
    """Seconds that the parts of a program's work take, one behind the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = time.monotonic()

    def lap(self, name: str) -> None:
        """What was done since the last call, or since the beginning, is called so."""
        now = time.monotonic()
        self.seconds[name], self._clock = round(now - self._clock, 3), now

    def write(self, output: Path) -> None:
        """Write `report/timings.json` into the artifact's folder."""
        (output / "report" / "timings.json").write_text(json.dumps(self.seconds, indent=1), encoding="utf-8")


def die_with_parent(sig: int = signal.SIGKILL) -> None:
    """Ask Linux to send `sig` to this process when the process that started it ends; elsewhere a no-op.

    torchrun gives every rank a session of its own, so killing a process group does not reach ranks: this does.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    launcher = os.environ.pop(LAUNCHER_PID, None)
    # The launcher may have died before the request above was made; then nobody would ever end this process.
    if launcher and os.getppid() != int(launcher):
        sys.exit(f"the process that launched this program ({launcher}) is gone")


def classify(error: BaseException) -> tuple[str, str]:
    """The kind and message of a failure, for the retry decision.

    >>> classify(OSError(28, "No space left on device"))[0]
    'disk_full'
    """
    if isinstance(error, ProgramError):
        return error.kind, str(error)
    if isinstance(error, InputError):
        return "bad_setting", str(error)
    text = f"{type(error).__name__}: {error}"
    out_of_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if out_of_space or "No space left on device" in text or disk_is_full():
        return "disk_full", disk_full(str(error))
    if isinstance(error, MemoryError) or any(words in text.lower() for words in NO_MEMORY):
        return "out_of_memory", text
    return "unexpected", text


def ended_by(number: int) -> str:
    """What a signal means, behind the name of what it ended.

    >>> ended_by(9)
    'was ended by signal 9 (for want of memory, or by hand)'
    """
    why = "for want of memory, or by hand" if number == signal.SIGKILL else "from outside"
    return f"was ended by signal {number} ({why})"


def disk_is_full() -> bool:
    """Whether the home's disk has no room: libraries that cannot write say all sorts of things."""
    home = Home.default().path
    return home.exists() and shutil.disk_usage(home).free < FULL_BYTES


def disk_full(what: str) -> str:
    """What failed, the disk and the cure."""
    return (
        f"{what}. The disk of {Home.default().path} is full: free space there or run `llamatuner artifacts gc`, "
        "then run the same command again."
    )


def _write_first(path: Path, text: str) -> None:
    """Write unless another rank already did: the first failure is the cause, the others lost their connection to it."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        print(f"{path} has the cause of an earlier failure", flush=True)


def hide(packages: Iterable[str]) -> None:
    """Make installed packages look absent in this process, so that no library imports them beside its own.

    peft imports bitsandbytes wherever it is installed, which takes 1.9 s of the 7 s before a program begins;
    transformers' Trainer imports datasets, and with it pandas: another second.
    """
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def main(work: Callable[[Spec, Events], None], uses: Callable[[Spec], set[str]] = lambda spec: set()) -> None:
    """Run `work` on the spec named on the command line; a failure is written down and ends with exit code 1.

    Args:
        work: what the program does.
        uses: those of `OPTIONAL` that it needs for a spec.
    """
    die_with_parent()
    spec = Spec.read(sys.argv[1])
    hide(OPTIONAL - uses(spec))
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it misses kernels, see OPTIONAL
    events = Events(spec.events)
    try:
        work(spec, events)
    except Exception as error:  # noqa: BLE001 - every failure is written down for the task, whatever it is
        traceback.print_exc()
        kind, message = classify(error)
        _write_first(Path(spec.failure), json.dumps({"kind": kind, "message": message}))
        sys.exit(1)
