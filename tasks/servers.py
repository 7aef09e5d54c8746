"""The servers that `llamatuner up` keeps, as every process of the home finds them.

One decision: a server is known by its process id together with the moment that process began. A process id alone is
used again, and would have us talk to a stranger, or end one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import psutil

from registry.errors import InputError, Problem
from registry.home import Home

PREFECT, MLFLOW, WORKER = "prefect", "mlflow", "worker"
SAME_SECONDS = 1.0  # the start of a process is reckoned from the clock's, which is set right now and then


@dataclass(frozen=True)
class Server:
    """One process that was started in the background."""

    pid: int
    """Its process id, and that of its process group."""
    started: float
    """When the process began, in seconds since 1970."""
    mark: str
    """In the environment of the process and of all that it starts: what is left of a killed one is found by it."""
    port: int | None
    """On loopback; None for the worker, which listens to nobody."""
    url: str | None
    """What clients are told: of Prefect its API."""

    def alive(self) -> bool:
        """Whether it still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < SAME_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def read_servers(home: Home) -> dict[str, Server]:
    """What `up` started and `down` has not ended, by name; they may have died since.

    Raises:
        InputError: the file is damaged.
    """
    try:
        text = home.servers.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):  # a home that cannot be is said where something is written
        return {}
    try:
        return {name: Server(**values) for name, values in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        cure = "End those servers by hand if they run, and remove the file."
        raise InputError(Problem(str(home.servers), f"a damaged record of servers: {error}", cure)) from error


def write_servers(home: Home, servers: dict[str, Server]) -> None:
    """Write the record, whole; without servers there is none."""
    if not servers:
        home.servers.unlink(missing_ok=True)
        return
    temporary = home.servers.with_suffix(".part")
    temporary.write_text(json.dumps({name: asdict(server) for name, server in servers.items()}, indent=1))
    temporary.rename(home.servers)


def address(home: Home, name: str) -> str | None:
    """What clients of a server are told, if it runs."""
    server = read_servers(home).get(name)
    return server.url if server and server.alive() else None
