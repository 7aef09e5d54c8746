"""A program to be started, and what every launcher does with it.

One decision: a launcher only starts a program, says whether it has ended, shows what it printed, and ends it. What a
program does and why it failed it says itself, through files of its work folder, wherever that folder is seen from.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tasks.nodes import Nodes
from tasks.program import Spec

PROJECT = Path(__file__).resolve().parents[2]
SPEC, LOG = "spec.json", "program.log"
LEFT = "job.json"  # which job of a cluster works in the folder
MACHINE = "machine-{}"  # folders of the other machines of a job, beside that of the first one
ANSWER_SECONDS = 60.0  # for one command of a cluster
Say = Callable[[str], None]


class ProgramFailed(Exception):
    """A launched program ended without success.

    Args:
        kind: what `tasks.program.classify` found, `killed` (by a signal) or `deadline`; decides about a retry.
        message: what to tell the person.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def retried(self) -> bool:
        """Whether doing the same again can help."""
        return self.kind in RETRIED


RETRIED = frozenset({"killed", "lost_port", "network"})


@dataclass(frozen=True)
class Cluster:
    """What a recipe says about where its programs run."""

    launcher: str
    """`slurm` or `kubernetes`."""
    options: Mapping[str, Any]
    """What it is asked for: options of sbatch, or `KubernetesSettings`."""
    home: str
    """The home, seen at the same place by all machines."""


@dataclass(frozen=True)
class Job:
    """A program to be started."""

    module: str
    spec: Spec
    folder: Path
    """Work folder of the step."""
    processes: int = 1
    """On each machine."""
    nodes: Nodes | None = None
    """The machines, where torchrun starts it; None: one plain process."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that must not stand in a file."""

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder / LOG

    @property
    def spec_file(self) -> Path:
        """What it is told."""
        return self.folder / SPEC

    @property
    def machines(self) -> int:
        """How many."""
        return self.nodes.count if self.nodes else 1

    def spec_text(self) -> str:
        """What stands in `spec_file`."""
        return json.dumps(asdict(self.spec), indent=1)

    def write(self) -> None:
        """Write the spec, and remove what an earlier attempt has left."""
        self.spec_file.write_text(self.spec_text(), encoding="utf-8")
        for leftover in (Path(self.spec.events), *self.failures()):
            leftover.unlink(missing_ok=True)
        Path(self.spec.events).touch()
        self.log.touch()

    def failures(self) -> list[Path]:
        """What the machines wrote about a failure, earliest first."""
        own = Path(self.spec.failure)
        found = [own, *self.folder.glob(f"{MACHINE.format('*')}/{own.name}")]
        return sorted((path for path in found if path.exists()), key=lambda path: path.stat().st_mtime)

    def digest(self, text: str) -> str:
        """Tells this job from another one in the same folder.

        Args:
            text: of its job file.
        """
        return hashlib.sha256(f"{text}\0{self.spec_text()}".encode()).hexdigest()

    def part(self) -> list[str]:
        """The command line, behind the interpreter, that every machine of a cluster starts."""
        machines = [f"--machines={self.machines}", f"--processes={self.processes}"] if self.nodes else []
        return ["-m", "tasks.launchers.machine", *machines, self.module, str(self.spec_file)]


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    """Its exit code; negative: by that signal."""
    kind: str = ""
    """`out_of_memory` where the kernel or the cluster says so."""
    words: str = ""
    """Theirs, where the exit code says less."""


class Running(Protocol):
    """A program that was started."""

    def wait(self, seconds: float) -> Ended | None:
        """How it ended; None while it is at it after so many seconds."""

    def logs(self) -> str:
        """What it has printed."""

    def cancel(self) -> None:
        """End it, unless it has ended, and leave nothing of it behind."""


class Launcher(Protocol):
    """Starts programs somewhere."""

    def launch(self, job: Job, say: Say) -> Running:
        """Start a program; returns at once.

        Args:
            job: the program.
            say: told what people want to know while they wait.

        Raises:
            ProgramFailed: it could not be started.
        """


def command(module: str, spec: Path, processes: int = 1, nodes: Nodes | None = None) -> list[str]:
    """The command line of a program: plain Python, or torchrun when it has several processes or `nodes` are given."""
    if processes == 1 and nodes is None:
        return [sys.executable, "-m", module, str(spec)]
    return [sys.executable, "-m", "tasks.ranks", *(nodes or Nodes()).torchrun(processes), "-m", module, str(spec)]


def job_name(folder: Path) -> str:
    """A job's name: the same for every attempt of a step, another one in another home. Good as a name in DNS.

    >>> job_name(Path("/home/ada/.llamatuner/work/add_tokens-3f9c2a1b4d5e"))
    'llamatuner-add-tokens-3f9c2a1b4d5e-c7b090c1'
    """
    home = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    return f"llamatuner-{folder.name.replace('_', '-').lower()}-{home}"


def read_left(folder: Path) -> dict[str, Any] | None:
    """What is known of the job that works in a folder, or worked there when its flow died; None: there is none."""
    path = folder / LEFT
    values: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return values


def write_left(folder: Path, **values: Any) -> None:
    """Note the job that works in a folder, by rename: a kill leaves the note whole or absent."""
    temporary = folder / f".{LEFT}"
    temporary.write_text(json.dumps(values), encoding="utf-8")
    temporary.rename(folder / LEFT)


def ask(
    line: Sequence[str], environment: Mapping[str, str] | None = None, seconds: float = ANSWER_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a command of a cluster; one that does not answer in time, or is not there, has exit code 127."""
    try:
        return subprocess.run(
            line,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            start_new_session=True,  # Ctrl-C is the flow's, and must not cut off what it asks for
            env=None if environment is None else dict(environment),
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(line, 127, "", f"no answer within {seconds:g} s")
    except FileNotFoundError:
        return subprocess.CompletedProcess(line, 127, "", f"{line[0]} is not installed")


def tail(text: str, lines: int = 15) -> str:
    """The last lines of a text."""
    return "\n".join(text.splitlines()[-lines:])
