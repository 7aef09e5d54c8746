"""What `llamatuner up` starts: Prefect's server, MLflow's server, and a worker that runs deployments.

One decision: everything is told to them through the environment, never on the command line: addresses of databases hold
passwords, and everybody on a machine can read command lines.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from registry.home import Home
from tasks.launch import python_path
from tasks.servers import MLFLOW, PREFECT, WORKER, Server

POOL = "llamatuner"  # the work pool of all deployments
HOST = "127.0.0.1"
MARK = "LLAMATUNER_SERVER"  # variable that holds `Server.mark`
BACKEND = "MLFLOW_BACKEND_STORE_URI"
POLL_SECONDS = "2"  # how often the worker asks for runs; Prefect's 10 s are for servers with many workers
HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
HEARTBEAT_SECONDS = 30  # between two signs of life of a run; the least that Prefect takes
LEASES = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
# Prefect's default forgets them when its server ends, and a lock whose holder died meanwhile would never be free again
KEPT_LEASES = "prefect.server.concurrency.lease_storage.filesystem"
BUSY, BUSY_TRIES, BUSY_SECONDS = 503, 10, 0.5
_open = build_opener(ProxyHandler({})).open  # loopback is never behind a proxy


def prefect_environment(home: Home) -> dict[str, str]:
    """Variables that keep Prefect's files under the home and its telemetry off."""
    return {"PREFECT_HOME": str(home.prefect), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Service:
    """How one of them is started and asked whether it works."""

    name: str
    title: str
    port: int | None
    """Used when none is asked for."""
    arguments: Callable[[int | None], list[str]]
    """Port → what follows `python -m`."""
    url: Callable[[int | None], str | None]
    """Port → what clients are told."""
    environment: Callable[[Home, str | None], dict[str, str]]
    """Home, address of Prefect's API → variables beside those of this process."""
    healthy: Callable[[Server, str | None], bool]
    """Server, address of Prefect's API → whether it answers; False also while it starts."""
    stop_seconds: float
    """From SIGTERM to SIGKILL."""


def without_credentials(url: str) -> str:
    """A URL without user, password and query, which can hold one too.

    >>> without_credentials("https://me:secret@host/api?password=secret")
    'https://host/api'
    """
    scheme, sign, rest = url.partition("://")
    if not scheme.startswith("sqlite"):  # which is a path, whatever characters it has
        rest = re.split("[?#]", rest.rpartition("@")[2])[0]
    return f"{scheme}{sign}{rest}"


def worker_name() -> str:
    """Of this machine's worker on Prefect's pages."""
    return f"llamatuner-{socket.gethostname()}"


def ask(url: str, body: dict[str, Any] | None = None, seconds: float = 3.0) -> Any:
    """What a server answers, read as JSON if it is that.

    Args:
        url: what is asked.
        body: sent as JSON; without it nothing is sent.
        seconds: for one answer. Prefect's server says 503 while its SQLite database is locked, and is asked again.

    Raises:
        OSError: it does not answer, or with an error.
    """
    content = None if body is None else json.dumps(body).encode()
    request = Request(url, content, {"Content-Type": "application/json"} if content else {})
    for left in reversed(range(BUSY_TRIES)):
        try:
            with _open(request, timeout=seconds) as answer:
                text = answer.read()
            break
        except HTTPError as error:
            if error.code != BUSY or not left:
                raise
            time.sleep(BUSY_SECONDS)
    try:
        return json.loads(text)
    except ValueError:
        return text.decode(errors="replace")


def answers(url: str) -> bool:
    """Whether a health address says yes."""
    try:
        ask(url)
    except (URLError, OSError):
        return False
    return True


def _worker_is_known(server: Server, api: str | None) -> bool:
    """Whether Prefect has heard from the worker since it was started."""
    from datetime import datetime

    try:
        workers = ask(f"{api}/work_pools/{POOL}/workers/filter", {}) if api else []
    except (URLError, OSError):  # the pool is made by the first worker
        return False
    heard = [each["last_heartbeat_time"] for each in workers if each["name"] == worker_name()]
    return any(datetime.fromisoformat(time).timestamp() > server.started for time in heard if time)


def _mlflow_environment(home: Home, api: str | None) -> dict[str, str]:
    variables = {
        BACKEND: os.environ.get(BACKEND) or f"sqlite:///{home.mlflow / 'mlflow.db'}",
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": (home.mlflow / "artifacts").as_uri(),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes less
    }
    return variables


def _worker_environment(home: Home, api: str | None) -> dict[str, str]:
    return prefect_environment(home) | {
        "PREFECT_API_URL": str(api),
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", POLL_SECONDS),
        HEARTBEAT: os.environ.get(HEARTBEAT, str(HEARTBEAT_SECONDS)),
        "LLAMATUNER_HOME": str(home.path),
        "PYTHONPATH": python_path(),
    }


SERVICES = {
    PREFECT: Service(
        PREFECT,
        "Prefect",
        4200,
        lambda port: ["prefect", "server", "start", "--host", HOST, "--port", str(port)],
        lambda port: f"http://{HOST}:{port}/api",
        # without its address the pages would talk to port 4200, whatever the server's own is
        lambda home, api: (
            prefect_environment(home)
            | {"PREFECT_API_URL": str(api), "PREFECT_UI_API_URL": str(api), LEASES: os.environ.get(LEASES, KEPT_LEASES)}
        ),
        lambda server, api: answers(f"{server.url}/health"),
        stop_seconds=10,
    ),
    MLFLOW: Service(
        MLFLOW,
        "MLflow",
        5000,
        lambda port: ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"],
        lambda port: f"http://{HOST}:{port}",
        _mlflow_environment,
        lambda server, api: answers(f"{server.url}/health"),
        stop_seconds=10,
    ),
    WORKER: Service(
        WORKER,
        "worker",
        None,
        lambda port: ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", worker_name()],
        lambda port: None,
        _worker_environment,
        _worker_is_known,
        stop_seconds=30,  # what it runs saves a checkpoint first
    ),
}


def page(server: Server) -> str | None:
    """The address for a browser."""
    return server.url.removesuffix("/api") if server.url else None


def command(service: Service, port: int | None) -> list[str]:
    """What is started."""
    return [sys.executable, "-m", *service.arguments(port)]
