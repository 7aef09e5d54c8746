"""Prefect's pages and a worker's pipe are windows: when nobody is there any more, the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import httpx
import pytest

from flows import pages
from flows.pages import Pages


def test_pages_that_cannot_be_written_are_said_once_and_left_out_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    said, written = list[str](), list[str]()

    def refused() -> None:
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(pages, "PAUSE", 60.0)
    writer = Pages(said.append)
    writer.write(written.append, "before")
    writer.write(refused)
    writer.write(written.append, "meanwhile")
    writer.write(refused)
    writer.finish()
    assert written == ["before"]
    assert said == ["Prefect cannot be reached: ConnectError: Connection refused. The run goes on without its pages."]


def test_a_page_that_takes_long_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LAST_SECONDS", 0.01)
    free, writer = threading.Event(), Pages(print)
    writer.write(lambda: free.wait(60) and None)
    writer.write(print, "never")
    writer.finish()
    free.set()


def test_a_fault_of_a_page_itself_is_raised_at_the_end() -> None:
    def broken() -> None:
        raise ValueError("no such curve")

    writer = Pages(print)
    writer.write(broken)
    with pytest.raises(ValueError, match="no such curve"):
        writer.finish()


BROKEN = """
import os, sys
from prefect.logging.configuration import setup_logging
from prefect.logging import get_logger
from flows.pages import outlive_reader

setup_logging()
outlive_reader()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    get_logger("pages").error("nobody reads this")
os.write(int(sys.argv[1]), b"still here")
"""


def test_a_run_outlives_the_reader_of_its_output() -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", BROKEN, str(writer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[writer],
        env=os.environ | {"PREFECT_LOGGING_TO_API_ENABLED": "false"},
    )
    os.close(writer)
    assert process.stdout is not None
    assert process.stdin is not None
    while b"ready" not in process.stdout.readline():
        continue
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    process.wait(120)
    assert os.read(reader, 100) == b"still here"
    os.close(reader)
