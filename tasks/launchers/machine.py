"""What every machine of a cluster's job starts: it makes its folder ready and becomes its part of the program.

python -m tasks.launchers.machine [--machines N --processes N] MODULE SPEC

One decision: a machine has a folder of its own, as where each has a disk of its own: the first one that of the step,
the others `machine-1`, `machine-2` … in it. So a program needs to know nothing about shared disks. A job that the
cluster starts again finds what the start before has half made, and removes it; checkpoints stay.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from tasks.launchers.job import MACHINE, SPEC, command
from tasks.nodes import nodes_of_environment
from tasks.program import Spec

RANKS = ("NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")  # ours, Slurm's, Kubernetes'


def main() -> None:
    """Become the program."""
    parser = argparse.ArgumentParser(prog="tasks.launchers.machine", description=__doc__)
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--processes", type=int, default=0, help="0: one plain process, without torchrun")
    parser.add_argument("module")
    parser.add_argument("spec", type=Path)
    given = parser.parse_args()
    rank = rank_of(os.environ)
    where = dict(os.environ) | {"NNODES": str(given.machines), "NODE_RANK": str(rank)}
    where.pop("RDZV_ID", None)  # which would deal out ranks anew at each start, and checkpoints belong to ranks
    line = command(
        given.module,
        prepare(given.spec, rank),
        max(1, given.processes),
        nodes_of_environment(where) if given.processes else None,
    )
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, given.processes))
    usual = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    sys.stdout.flush()
    os.execve(line[0], line, usual | os.environ | {"PYTHONUNBUFFERED": "1"})


def rank_of(environment: Mapping[str, str]) -> int:
    """Number of this machine, from 0.

    >>> rank_of({"SLURM_NODEID": "3"}), rank_of({})
    (3, 0)
    """
    return next((int(environment[name]) for name in RANKS if name in environment), 0)


def prepare(path: Path, rank: int) -> Path:
    """Make a machine's folder ready; the spec of its part.

    Args:
        path: the step's spec.
        rank: number of the machine.
    """
    spec = Spec.read(path)
    if rank:
        folder = path.parent / MACHINE.format(rank)
        folder.mkdir(exist_ok=True)
        output, scratch, events, failure = (
            str(folder / Path(place).name) for place in (spec.output, spec.scratch, spec.events, spec.failure)
        )
        spec, path = replace(spec, output=output, scratch=scratch, events=events, failure=failure), folder / SPEC
        path.write_text(json.dumps(asdict(spec), indent=1), encoding="utf-8")
        Path(spec.events).write_text("", encoding="utf-8")  # the first machine's are the step's
    Path(spec.failure).unlink(missing_ok=True)
    shutil.rmtree(spec.output, ignore_errors=True)
    Path(spec.output).mkdir()
    Path(spec.scratch).mkdir(exist_ok=True)
    return path


if __name__ == "__main__":
    main()
