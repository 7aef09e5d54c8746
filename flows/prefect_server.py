"""The Prefect API inside a run, when no server is set.

One decision: we start it ourselves instead of letting Prefect do so, because Prefect's own stays behind when its
parent is killed; ours asks the kernel to be ended with the run. Runs of one home share the database, one server each.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from registry.home import Home
from tasks.launch import python_path
from tasks.locks import locked
from tasks.program import LAUNCHER_PID, die_with_parent

START_SECONDS = 120.0  # a new database took 8 to 11 s on two busy cores
STOP_SECONDS = 5.0


def server_environment(home: Home) -> dict[str, str]:
    """Variables that keep Prefect's files under the home and its telemetry off."""
    return {
        "PREFECT_HOME": str(home.prefect),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }


@contextmanager
def prefect_api(home: Home, meanwhile: Callable[[], None] = lambda: None) -> Iterator[str]:
    """An API for the body: the one in PREFECT_API_URL, or one of our own on loopback.

    Args:
        home: where our own keeps its database and its log.
        meanwhile: done while our own starts, which takes seconds; it may import prefect.

    Yields:
        Its address. The environment points Prefect to it; import prefect only inside the body, or in `meanwhile`.

    Raises:
        RuntimeError: our own did not become healthy; its log is named.
    """
    os.environ |= server_environment(home) if "PREFECT_API_URL" not in os.environ else {}
    if os.environ.get("PREFECT_API_URL"):
        yield os.environ["PREFECT_API_URL"]
        return
    home.prefect.mkdir(parents=True, exist_ok=True)
    with locked(home.locks / "prefect-start.lock"):  # two migrations of one new database at once would fail
        port = _free_port()
        server = _start(home, port)
        url = os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        try:
            meanwhile()
            _wait(server, url, home.prefect / "server.log")
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


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"Prefect's server ended with exit code {server.returncode}; see {log}")
        try:
            with urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"Prefect's server was not healthy within {START_SECONDS:g} s; see {log}")


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
