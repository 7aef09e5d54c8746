"""Where launchers are tried: a cluster's commands on PATH, and programs that do nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.launch import PROJECT
from tasks.program import Spec

WAIT_SECONDS = 180.0  # for anything, on a machine that has much else to do
COUNTING = """
import os, signal, time
from pathlib import Path
from tasks.program import ProgramError, main

def work(spec, events):
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    state = Path(spec.scratch) / "state"
    step = int(state.read_text()) if state.exists() else 0
    events.emit("note", text=f"from {step}, process {os.getpid()}, token {os.environ.get('TOKEN')}")
    (Path(spec.output) / f"begun-{step}").touch()
    while step < spec.settings["steps"]:
        time.sleep(0.1)
        step += 1
        events.emit("progress", step=step, total=spec.settings["steps"])
        if asked:
            state.write_text(str(step))
            (Path(spec.scratch) / "whole.json").touch()
            raise ProgramError("killed", f"ended by SIGTERM behind step {step}")
    (Path(spec.output) / "made").write_text(str(step))
    print("counted")

main(work)
"""
"""Counts steps; SIGTERM makes it save the last one, and the next start goes on there."""


def commands(folder: Path, stand_in: Path, names: tuple[str, ...]) -> None:
    """Put commands that a stand-in plays into `folder/bin`."""
    (folder / "bin").mkdir()
    for name in names:
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {stand_in} {name} "$@"\n')
        file.chmod(0o755)


def toy(folder: Path, body: str = COUNTING, **settings: Any) -> tuple[str, Spec, Path]:
    """A module that `-m` finds, its spec, and its work folder."""
    (folder / "toy_program.py").write_text(textwrap.dedent(body))
    work = folder / "home" / "work" / "train-0123456789ab"
    for name in ("output", "scratch"):
        (work / name).mkdir(parents=True, exist_ok=True)
    names = ("output", "scratch", "events.jsonl", "failure.json")
    return "toy_program", Spec({"steps": 5} | settings, {}, {}, *(str(work / name) for name in names)), work


def wait_for(happened: Callable[[], Any], what: str) -> Any:
    """What `happened` comes to say, within the time that there is."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        found = happened()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {WAIT_SECONDS:g} s")


def start_flow(launcher: str, module: str, spec: Spec, folder: Path) -> subprocess.Popen[bytes]:
    """A process that runs a program as a flow does.

    Args:
        launcher: an expression that makes it.
    """
    code = f"""
import json, sys
from pathlib import Path
from tasks.launch import run_program
from tasks.launchers.job import Cluster
from tasks.launchers.kubernetes import Kubernetes
from tasks.launchers.slurm import Slurm
from tasks.program import Spec
spec = Spec(**json.loads(sys.argv[1]))
run_program({module!r}, spec, Path({str(folder)!r}), print, launcher={launcher})
"""
    path = os.pathsep.join([str(PROJECT), os.environ["PYTHONPATH"]])
    line = [sys.executable, "-c", code, json.dumps(spec.__dict__)]
    return subprocess.Popen(line, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)


def events_of(spec: Spec, kind: str) -> list[dict[str, Any]]:
    """What a program has told so far."""
    path = Path(spec.events)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["kind"] == kind]


def notes(seen: list[dict[str, Any]]) -> list[str]:
    """What a person was told."""
    return [event["text"] for event in seen if event["kind"] == "note"]


def nothing_left(folder: Path) -> Iterator[None]:
    """After a test no process of its may be left; those that are are ended first."""
    yield
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or [])
    ]
    for process in left:
        process.kill()
    if left:
        pytest.fail(f"left behind: {[process.info['cmdline'] for process in left]}")
