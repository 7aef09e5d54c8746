"""The lock of a key among machines, on a real Prefect server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path

import pytest

from flows.server_locks import LEASE_SECONDS, across_machines, server_lock
from flows.services import SERVICES, answers
from registry.home import Home
from tasks.artifacts import on_this_machine
from tasks.locks import Interrupted
from tasks.servers import PREFECT
from tests.flows.conftest import Server
from tests.flows.test_servers import free_port

KEY = "a" * 64
HOLD = (
    "import sys, threading, time\nfrom flows.server_locks import server_lock\n"
    "with server_lock(sys.argv[1], threading.Event(), print):\n    print('held', flush=True)\n    time.sleep(3600)"
)


@pytest.fixture(autouse=True)
def served(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that is asked."""
    monkeypatch.setenv("PREFECT_API_URL", server.url)


def holder(key: str) -> subprocess.Popen[str]:
    """Another process that has the lock of a key."""
    command = [sys.executable, "-c", HOLD, key]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_one_holds_it_the_other_waits_and_says_so_and_gets_it() -> None:
    order, said, inside = list[str](), list[str](), threading.Event()

    def second() -> None:
        inside.wait(60)
        with server_lock(KEY, threading.Event(), said.append):
            order.append("second")

    thread = threading.Thread(target=copy_context().run, args=(second,))  # with the settings of Prefect
    thread.start()
    with server_lock(KEY, threading.Event(), said.append), server_lock("b" * 64, threading.Event(), said.append):
        inside.set()
        while not said:
            assert thread.is_alive()
            time.sleep(0.1)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert said == [f"waiting for another machine, which is at it (limit llamatuner-{KEY[:32]} on Prefect's server)"]


def test_a_wait_ends_when_the_run_is_asked_to_stop() -> None:
    stop = threading.Event()
    with (
        server_lock(KEY, threading.Event(), print),
        pytest.raises(Interrupted),
        server_lock(KEY, stop, lambda text: stop.set()),
    ):
        raise AssertionError("two have it")


def test_a_server_that_cannot_lend_is_said_and_the_step_is_made(server: Server) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    said: list[str] = []
    nobody = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(nobody), server_lock(KEY, threading.Event(), said.append):
        said.append("made")
    assert said.pop() == "made"
    assert len(said) == 1
    assert said[0].startswith("no lock among machines, another one may make the same (ConnectError")


def test_without_a_server_that_others_ask_there_is_no_lock_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert across_machines() is on_this_machine  # this process has started the server for itself
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert across_machines() is server_lock
    monkeypatch.delenv("PREFECT_API_URL")
    assert across_machines() is on_this_machine


@contextmanager
def lasting(home: Home, port: int) -> Iterator[str]:
    """A server as `llamatuner up` starts it; that of a single run lends as well, and takes nothing back by itself."""
    service = SERVICES[PREFECT]
    url = str(service.url(port))
    home.path.mkdir(exist_ok=True)
    log = home.path / "server.log"
    with open(log, "ab") as written:
        server = subprocess.Popen(
            [sys.executable, "-m", *service.arguments(port)],
            env=os.environ | service.environment(home, url),
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        while not answers(f"{url}/health"):
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_the_lock_of_a_machine_that_died_is_free_again_also_when_the_server_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    home, port, said = Home(tmp_path / "server"), free_port(), list[str]()
    with lasting(home, port) as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        process = holder(KEY)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with lasting(home, port) as url, temporary_settings({PREFECT_API_URL: url}):
        began = time.monotonic()
        with server_lock(KEY, threading.Event(), said.append):
            waited = time.monotonic() - began
    assert len(said) <= 1
    assert waited < LEASE_SECONDS + 15 + 30  # Prefect looks for ended loans every 15 s; the rest is for busy machines
