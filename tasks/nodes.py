"""The machines that train together, as the environment describes them.

One decision: the names are those that torchrun, LLaMA-Factory and cluster managers use. They are read here only, and
what they say is checked before anything starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from registry.errors import InputError, Problem

DEFAULT_PORT = 29500  # torchrun's
HERE = "127.0.0.1"
TRUE = ("1", "true", "yes", "y", "on")


@dataclass(frozen=True)
class Nodes:
    """Which of how many machines this is, and where they meet."""

    count: int = 1
    """Machines (NNODES)."""
    rank: int = 0
    """Number of this one, from 0 (NODE_RANK)."""
    address: str = HERE
    """Host of machine 0, reached by all (MASTER_ADDR)."""
    port: int = 0
    """Its port, reached by all (MASTER_PORT); 0 on one machine: a free one."""
    job: str | None = None
    """Name of the meeting, the same on all machines (RDZV_ID); set for elastic starts."""
    restarts: int = 0
    """How many times all processes are started anew when one of them fails (MAX_RESTARTS)."""

    def torchrun(self, processes: int) -> list[str]:
        """torchrun's arguments for so many processes on each machine.

        >>> Nodes().torchrun(2)[1:]
        ['--nproc-per-node=2', '--rdzv-backend=c10d', '--rdzv-endpoint=127.0.0.1:0']
        """
        arguments = [f"--nnodes={self.count}", f"--nproc-per-node={processes}"]
        arguments += [f"--max-restarts={self.restarts}"] if self.restarts else []
        if self.count > 1 and self.job is None:
            place = [f"--node-rank={self.rank}", f"--master-addr={self.address}", f"--master-port={self.port}"]
            return arguments + place
        job = [f"--rdzv-id={self.job}"] if self.job is not None else []
        return [*arguments, "--rdzv-backend=c10d", f"--rdzv-endpoint={self.address}:{self.port}", *job]


def nodes_of_environment(environment: Mapping[str, str] = os.environ) -> Nodes:
    """The machines that NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, RDZV_ID and MAX_RESTARTS describe.

    Raises:
        InputError: a number that is none, a rank that there is not, or several machines without a place to meet.
    """
    problems: list[Problem] = []

    def number(name: str, default: int, lowest: int, highest: int) -> int:
        text = environment.get(name) or str(default)
        if text.isascii() and text.isdigit() and lowest <= int(text) <= highest:
            return int(text)
        problems.append(Problem(name, f"{text!r} is not a whole number from {lowest} to {highest}", f"E.g. {default}."))
        return default

    count = number("NNODES", 1, 1, 100_000)
    restarts = number("MAX_RESTARTS", 0, 0, 1000)
    if count == 1:
        nodes = Nodes(restarts=restarts)
    else:
        port = number("MASTER_PORT", DEFAULT_PORT, 1, 65535)
        rank = number("NODE_RANK", 0, 0, count - 1)
        for name in () if environment.get("RDZV_ID") else ("NODE_RANK",):
            if not environment.get(name):
                problems.append(Problem(name, f"NNODES is {count} and nothing says which one this is", "0 on one."))
        if not environment.get("MASTER_ADDR"):
            rule = f"NNODES is {count} and nothing says where they meet"
            problems.append(Problem("MASTER_ADDR", rule, "The host of machine 0, the same on all."))
        job = environment.get("RDZV_ID") or None
        nodes = Nodes(count, rank, environment.get("MASTER_ADDR", HERE), port, job, restarts)
    if problems:
        raise InputError(problems, "environment")
    return nodes


def torchrun_is_forced(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether FORCE_TORCHRUN asks for torchrun also where one process is enough."""
    return environment.get("FORCE_TORCHRUN", "").lower() in TRUE
