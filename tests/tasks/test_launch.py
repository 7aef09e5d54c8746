"""A launched program is followed, and nothing of it is left, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.launch import PROJECT, ProgramFailed, command, run_program
from tasks.locks import Interrupted
from tasks.nodes import Nodes
from tasks.program import Spec

TREE = """
import subprocess, sys, time
from tasks.program import main
def work(spec, events):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
    events.emit("note", text=str(child.pid))
    time.sleep(120)
main(work)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module that `-m` finds, and its spec."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(body: str) -> tuple[str, Spec, Path]:
        (tmp_path / "toy_program.py").write_text(textwrap.dedent(body))
        spec = Spec({"x": 1}, {}, {}, *(str(tmp_path / name) for name in ("output", "scratch", "events", "failure")))
        return "toy_program", spec, tmp_path

    return make


def gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_events_come_in_order_and_whole(program: Any) -> None:
    module, spec, folder = program(
        """
        from tasks.program import main
        def work(spec, events):
            for step in range(200):
                events.emit("progress", step=step, total=200)
        main(work)
        """
    )
    seen: list[dict[str, Any]] = []
    run_program(module, spec, folder, seen.append)
    assert [event["step"] for event in seen] == list(range(200))


@pytest.mark.parametrize(
    ("body", "kind", "retried"),
    [
        ("raise ProgramError('not_finite', 'loss is not finite at step 3')", "not_finite", False),
        ("raise OSError(28, 'No space left on device')", "disk_full", False),
        ("raise ValueError('what')", "unexpected", False),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", True),
        ("import os; os._exit(7)", "unexpected", False),
    ],
)
def test_the_cause_of_a_failure_decides_about_a_retry(program: Any, body: str, kind: str, retried: bool) -> None:
    module, spec, folder = program(
        f"from tasks.program import ProgramError, main\ndef work(spec, events):\n    {body}\nmain(work)\n"
    )
    with pytest.raises(ProgramFailed) as caught:
        run_program(module, spec, folder, lambda event: None)
    assert (caught.value.kind, caught.value.retried) == (kind, retried)


def test_a_stop_request_ends_the_whole_tree(program: Any) -> None:
    module, spec, folder = program(TREE)
    stop, pids = threading.Event(), list[int]()

    def on_event(event: dict[str, Any]) -> None:
        pids.append(int(event["text"]))
        threading.Timer(1.5, stop.set).start()

    with pytest.raises(Interrupted):
        run_program(module, spec, folder, on_event, stop)
    assert gone(pids[0])


def test_a_deadline_ends_the_program(program: Any) -> None:
    module, spec, folder = program(TREE)
    began = time.monotonic()
    with pytest.raises(ProgramFailed) as caught:
        run_program(module, spec, folder, lambda event: None, deadline=1.0)
    assert caught.value.kind == "deadline"
    assert time.monotonic() - began < 15


@pytest.mark.slow
def test_a_program_dies_with_the_process_that_launched_it(program: Any) -> None:
    module, spec, folder = program(TREE)
    code = f"""
import json, sys
from dataclasses import replace
from pathlib import Path
from tasks.launch import run_program
from tasks.program import Spec
run_program({module!r}, Spec(**json.loads(sys.argv[1])), Path({str(folder)!r}), lambda e: print("up", flush=True))
"""
    spec_text = json.dumps(spec.__dict__)
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, spec_text],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ["PYTHONPATH"]])},
    )
    assert launcher.stdout
    assert launcher.stdout.readline() == "up\n"
    pids = [p.pid for p in psutil.Process(launcher.pid).children() if "toy_program" in " ".join(p.cmdline())]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert len(pids) == 1
    assert gone(pids[0])


def test_several_processes_are_started_by_torchrun_on_a_free_port(tmp_path: Path) -> None:
    line = command("tasks.train.program", tmp_path / "spec.json", 2)
    assert line[1:3] == ["-m", "tasks.ranks"]
    assert "--rdzv-endpoint=127.0.0.1:0" in line
    assert command("tasks.train.program", tmp_path / "spec.json", 1)[1:3] == ["-m", "tasks.train.program"]


def test_a_program_on_several_machines_is_started_where_they_meet(tmp_path: Path) -> None:
    line = command("tasks.train.program", tmp_path / "spec.json", 1, Nodes(2, 1, "10.0.0.1", 29666))
    assert line[1:3] == ["-m", "tasks.ranks"]
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29666"} <= set(line)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_is_named_as_the_cause(program: Any) -> None:
    module, spec, folder = program(
        """
        import os, signal, time
        from tasks.program import main
        def work(spec, events):
            events.emit("note", text=str(os.getpid()))
            if os.environ["RANK"] == "1":
                while not (os.path.exists(spec.events) and os.path.getsize(spec.events)):  # the other is there
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1.0)
            raise ConnectionError("Connection closed by peer")  # what a rank says that lost another one
        main(work)
        """
    )
    pids: list[int] = []
    with pytest.raises(ProgramFailed, match=r"rank 1 was ended by signal 9 \(for want of memory") as caught:
        run_program(module, spec, folder, lambda event: pids.append(int(event["text"])), processes=2)
    assert (caught.value.kind, caught.value.retried) == ("killed", True)
    assert gone(pids[0])


@pytest.mark.slow
def test_a_cause_that_a_rank_wrote_stays_the_cause(program: Any) -> None:
    module, spec, folder = program(
        """
        import os, time
        from tasks.program import ProgramError, main
        def work(spec, events):
            if os.environ["RANK"] == "1":
                raise ProgramError("not_finite", "loss is not finite at step 3")
            time.sleep(120)
        main(work)
        """
    )
    began = time.monotonic()
    with pytest.raises(ProgramFailed, match="loss is not finite at step 3"):
        run_program(module, spec, folder, lambda event: None, processes=2)
    assert time.monotonic() - began < 60  # most of it is the import of torch, twice


@pytest.mark.slow
def test_two_jobs_at_once_meet_at_ports_of_their_own(program: Any, tmp_path: Path) -> None:
    module, spec, _ = program(
        """
        import os
        from tasks.program import main
        main(lambda spec, events: events.emit("note", text=os.environ["MASTER_PORT"]))
        """
    )
    ports: list[str] = []

    def job(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        own = replace(spec, events=str(folder / "events"), failure=str(folder / "failure"))
        run_program(module, own, folder, lambda event: ports.append(event["text"]), processes=2)

    jobs = [threading.Thread(target=job, args=(name,)) for name in ("one", "other")]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert len(set(ports)) == 2
