"""The Prefect API inside a run: the one that is set, the one of `llamatuner up`, or one of the run's own.

One decision: the run's own we start ourselves instead of letting Prefect do so, because Prefect's stays behind when its
parent is killed; ours asks the kernel to be ended with the run. Runs of one home share the database, one server each.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from flows.services import HEARTBEAT, HEARTBEAT_SECONDS, answers, prefect_environment
from registry.home import Home
from tasks.launch import python_path
from tasks.locks import locked
from tasks.program import LAUNCHER_PID, die_with_parent
from tasks.servers import PREFECT, read_servers

START_SECONDS = 120.0  # a new database took 8 to 11 s on two busy cores
STOP_SECONDS = 5.0
QUIET = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL"}
"""What a person is to know of Prefect in a run on a terminal, the run says itself."""
_OWN: set[str] = set()  # addresses of the servers that this process has started for itself


@contextmanager
def prefect_api(home: Home, meanwhile: Callable[[], None] = lambda: None) -> Iterator[str]:
    """An API for the body: the one in PREFECT_API_URL, the one of `llamatuner up`, or one of our own on loopback.

    Args:
        home: where our own keeps its database and its log.
        meanwhile: done while our own starts, which takes seconds; it may import prefect.

    Yields:
        Its address. The environment points Prefect to it; import prefect only inside the body, or in `meanwhile`.

    Raises:
        RuntimeError: our own, or that of `up`, did not become healthy; its log is named.
    """
    os.environ.setdefault(HEARTBEAT, str(HEARTBEAT_SECONDS))
    if "PREFECT_API_URL" not in os.environ:
        os.environ |= prefect_environment(home) | QUIET
    if os.environ.get("PREFECT_API_URL"):
        yield os.environ["PREFECT_API_URL"]
        return
    with _served(home) or _own(home, meanwhile) as url:
        yield url


def is_own(url: str) -> bool:
    """Whether nobody but this run asks the server at an address."""
    return url in _OWN


def _served(home: Home) -> AbstractContextManager[str] | None:
    """The server of `llamatuner up`, if it runs."""
    server = read_servers(home).get(PREFECT)
    if server is None or server.url is None or not server.alive():
        return None
    url = server.url

    @contextmanager
    def pointed() -> Iterator[str]:
        os.environ["PREFECT_API_URL"] = url
        try:
            _wait(lambda: None if server.alive() else "was ended", url, home.logs / "prefect.log")
            yield url
        finally:
            os.environ.pop("PREFECT_API_URL", None)

    return pointed()


@contextmanager
def _own(home: Home, meanwhile: Callable[[], None]) -> Iterator[str]:
    home.prefect.mkdir(parents=True, exist_ok=True)
    with locked(home.locks / "prefect-start.lock"):  # two migrations of one new database at once would fail
        port = _free_port()
        server = _start(home, port)
        url = os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        _OWN.add(url)
        try:
            meanwhile()
            _wait(lambda: _ended(server), url, home.prefect / "server.log")
        except BaseException:
            del os.environ["PREFECT_API_URL"]
            _stop(server)
            raise
    try:
        yield url
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        _stop(server)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(home: Home, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        LAUNCHER_PID: str(os.getpid()),
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        "PYTHONPATH": python_path(),
    }
    with open(home.prefect / "server.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.prefect_server", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the run only; the run needs the API to close itself
        )


def _ended(server: subprocess.Popen[bytes]) -> str | None:
    return None if server.poll() is None else f"ended with exit code {server.returncode}"


def _wait(ended: Callable[[], str | None], url: str, log: Path) -> None:
    """Wait until an API answers; `ended` says how its server ended, None while it runs."""
    deadline = time.monotonic() + START_SECONDS
    while not answers(f"{url}/health"):
        if how := ended():
            raise RuntimeError(f"Prefect's server {how}; see {log}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"Prefect's server was not healthy within {START_SECONDS:g} s; see {log}")
        time.sleep(0.1)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def main() -> None:
    """Serve Prefect's API on the port named on the command line until the parent ends."""
    die_with_parent()
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="error",
        lifespan="on",
    )


if __name__ == "__main__":
    main()
