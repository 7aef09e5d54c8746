"""A program that Slurm starts is followed, stopped, taken over and started again as one of this machine's is.

Everything here runs on a stand-in of Slurm's commands, which really runs the job file. With LLAMATUNER_TEST_SLURM=1
it runs a second time on the Slurm of this machine, where there is one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from registry.cluster_records import slurm_problems
from tasks.launch import PROJECT, ProgramFailed, run_program
from tasks.launchers import choice
from tasks.launchers.job import Cluster, Job, job_name, read_left
from tasks.launchers.slurm import Slurm, environment, problems
from tasks.locks import Interrupted
from tasks.nodes import Nodes
from tasks.program import Spec
from tests.tasks.launchers.ground import (
    WAIT_SECONDS,
    commands,
    events_of,
    notes,
    nothing_left,
    start_flow,
    toy,
    wait_for,
)

STAND_IN = Path(__file__).with_name("stand_in_slurm.py")
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
REAL = os.environ.get("LLAMATUNER_TEST_SLURM") == "1" and shutil.which("sinfo") is not None
OPTIONS = {"cpus-per-task": 1}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Slurm's commands, played by a file of ours."""
    commands(tmp_path, STAND_IN, COMMANDS)
    (tmp_path / "jobs").mkdir()
    monkeypatch.setenv("STAND_IN", str(tmp_path / "jobs"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TOKEN", "secret-7")
    yield from nothing_left(tmp_path)


@pytest.fixture(params=["stand-in", "real"] if REAL else ["stand-in"])
def slurm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Slurm to submit to."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
        yield "stand-in"
        return
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TOKEN", "secret-7")
    yield "real"


def cluster(folder: Path, **options: Any) -> Cluster:
    return Cluster("slurm", OPTIONS | options, str(folder / "home"))


def launcher(folder: Path, **options: Any) -> Slurm:
    return Slurm(cluster(folder, **options), look=0.5, settle=3.0)


def run(folder: Path, program: tuple[str, Spec, Path], **arguments: Any) -> list[dict[str, Any]]:
    """Run a program to its end; what it told."""
    seen: list[dict[str, Any]] = []
    on_event = arguments.pop("on_event", seen.append)
    given = {"deadline": WAIT_SECONDS, "launcher": launcher(folder)} | arguments
    run_program(program[0], program[1], program[2], on_event, **given)
    return seen


def job_of(work: Path) -> str:
    """Slurm's number of the job of a work folder, when it has one."""
    number: str = wait_for(lambda: (read_left(work) or {}).get("id"), "the submission")
    return number


def during(program: tuple[str, Spec, Path], act: Callable[[str], Any], step: int = 3) -> threading.Thread:
    """Do something with the job, by number, when the program has made some steps."""
    work = program[2]

    def wait_and_act() -> None:
        wait_for(lambda: len(events_of(program[1], "progress")) >= step, f"step {step}")
        act(job_of(work))

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def test_the_job_file_says_all_that_is_needed_and_nothing_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/opt/llamatuner/bin/python")
    folder, asked = (
        Path("/shared/home/work/train-0123456789ab"),
        {"partition": "gpu", "gres": "gpu:8", "exclusive": True},
    )
    spec = Spec({}, {}, {}, "", "", "", "")
    job = Job("tasks.train.program", spec, folder, 8, Nodes(2), {"TOKEN": "secret-7"})
    text = Slurm(Cluster("slurm", asked | {"comment": "it's $HOME"}, "/shared/home")).job_file(job)
    assert text.splitlines()[:13] == [
        "#!/bin/bash",
        f"#SBATCH --job-name={job_name(folder)}",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --output=/shared/home/work/train-0123456789ab/program.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --partition=gpu",
        "#SBATCH --gres=gpu:8",
        "#SBATCH --exclusive",
        "#SBATCH --comment='it'\"'\"'s $HOME'",
        "",
    ]
    lines = text.splitlines()
    assert "export LLAMATUNER_HOME=/shared/home" in lines
    assert f'export PYTHONPATH={PROJECT}"${{PYTHONPATH:+:$PYTHONPATH}}"' in lines
    assert 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in lines
    started = "/opt/llamatuner/bin/python -m tasks.launchers.machine --machines=2 --processes=8 tasks.train.program"
    assert f"srun --kill-on-bad-exit=1 {started} {folder}/spec.json &" in lines
    assert "secret-7" not in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_places_with_blanks_quotes_and_dollars_are_quoted(tmp_path: Path, stand_in: Path) -> None:
    place = tmp_path / "it's a $HOME; touch broken %j"
    place.mkdir()
    program = toy(place, steps=1)
    shutil.move(place / "toy_program.py", tmp_path)
    run(place, program)
    assert (program[2] / "output" / "made").exists()
    assert "counted" in (program[2] / "program.log").read_text()
    assert list(tmp_path.rglob("broken*")) == []


def test_a_program_runs_in_a_job_and_tells_what_it_does(tmp_path: Path, slurm: str) -> None:
    program = toy(tmp_path)
    work = program[2]
    seen = run(tmp_path, program)
    assert [event["step"] for event in seen if event["kind"] == "progress"] == [1, 2, 3, 4, 5]
    assert (work / "output" / "made").read_text() == "5"
    assert "counted" in (work / "program.log").read_text()
    assert read_left(work) is None
    assert notes(seen)[0].startswith("Slurm job ")
    # what is in the environment reaches the program, and stands in no file that was made to start it
    assert any("token secret-7" in text for text in notes(seen))
    assert not any("secret-7" in (work / name).read_text() for name in ("job.sbatch", "spec.json", "program.log"))


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("raise ProgramError('not_finite', 'loss is not finite at step 3')", "not_finite", "loss is not finite"),
        ("import os; os._exit(7)", "unexpected", "exit code 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "signal 9"),
    ],
)
def test_the_cause_of_a_failure_is_found(tmp_path: Path, slurm: str, body: str, kind: str, words: str) -> None:
    text = f"from tasks.program import ProgramError, main\ndef work(spec, events):\n    {body}\nmain(work)\n"
    with pytest.raises(ProgramFailed, match=words) as caught:
        run(tmp_path, toy(tmp_path, text))
    assert caught.value.kind == kind


def test_a_job_that_somebody_cancels_is_tried_again(tmp_path: Path, slurm: str) -> None:
    program = toy(tmp_path, steps=10_000)
    acting = during(program, lambda number: subprocess.run(["scancel", number], check=True))
    with pytest.raises(ProgramFailed) as caught:
        run(tmp_path, program)
    acting.join()
    assert caught.value.retried
    assert read_left(program[2]) is None


def test_a_job_that_slurm_does_not_take_is_not_tried_again(tmp_path: Path, slurm: str) -> None:
    with pytest.raises(ProgramFailed, match=r"sbatch refuses .*job.sbatch: .*invalid partition") as caught:
        run(tmp_path, toy(tmp_path), launcher=launcher(tmp_path, partition="none"))
    assert not caught.value.retried
    assert read_left(tmp_path / "home/work/train-0123456789ab") is None


def test_a_controller_that_is_away_is_asked_again(tmp_path: Path, stand_in: Path) -> None:
    program = toy(tmp_path)
    with pytest.raises(ProgramFailed, match="Unable to contact slurm controller") as caught:
        run(tmp_path, program, launcher=launcher(tmp_path, partition="away"))
    assert caught.value.retried
    assert read_left(program[2]) is not None  # a job may be there, and would be found by its name
    run(tmp_path, program)
    assert (program[2] / "output" / "made").exists()


def test_a_stop_request_ends_the_job_which_saves_first(tmp_path: Path, slurm: str) -> None:
    program, stop = toy(tmp_path, steps=10_000), threading.Event()
    numbers: list[str] = []
    acting = during(program, lambda number: (numbers.append(number), stop.set()))
    with pytest.raises(Interrupted):
        run(tmp_path, program, stop=stop)
    acting.join()
    assert int((program[2] / "scratch" / "state").read_text()) >= 3
    state = ["squeue", "--states=all", "--noheader", "--format=%T", f"--jobs={numbers[0]}"]
    assert subprocess.run(state, capture_output=True, text=True).stdout.strip() == "CANCELLED"
    assert read_left(program[2]) is None


def killed_flow(folder: Path, program: tuple[str, Spec, Path]) -> tuple[str, int]:
    """A flow that was killed without a word: the number of its job, and the program's process."""
    made = f"Slurm(Cluster('slurm', {OPTIONS}, {str(folder / 'home')!r}), look=0.5, settle=3.0)"
    flow = start_flow(made, *program)
    wait_for(lambda: events_of(program[1], "progress"), "the first step")
    number = job_of(program[2])
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    return number, process_in(events_of(program[1], "note")[0]["text"])


def process_in(note: str) -> int:
    return int(note.split("process ")[1].split(",")[0])


def test_the_job_of_a_flow_that_was_killed_is_taken_over(tmp_path: Path, slurm: str) -> None:
    program = toy(tmp_path, steps=60)
    number, _ = killed_flow(tmp_path, program)
    seen = run(tmp_path, program)
    assert notes(seen)[0] == f"Slurm job {number} was begun by an earlier run; it is taken over"
    assert [event["step"] for event in seen if event["kind"] == "progress"] == list(range(1, 61))  # begun once
    assert read_left(program[2]) is None


def test_a_job_that_ended_while_no_flow_was_there_is_taken_over_too(tmp_path: Path, slurm: str) -> None:
    program = toy(tmp_path, steps=20)
    killed_flow(tmp_path, program)
    wait_for(lambda: (program[2] / "exit").exists(), "the end")
    assert "it is taken over" in notes(run(tmp_path, program))[0]
    assert (program[2] / "output" / "made").exists()


def test_a_job_that_does_something_else_is_ended_before_another_begins(tmp_path: Path, slurm: str) -> None:
    _, process = killed_flow(tmp_path, toy(tmp_path, steps=10_000))
    seen = run(tmp_path, toy(tmp_path, steps=10))
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    assert not any("taken over" in text for text in notes(seen))


def test_a_step_that_moves_to_this_machine_ends_its_job_first(tmp_path: Path, slurm: str) -> None:
    program = toy(tmp_path, steps=10_000)
    killed_flow(tmp_path, program)
    assert choice.end_left(program[2], "slurm")  # which may take it over
    assert not choice.end_left(program[2])
    assert read_left(program[2]) is None
    assert int((program[2] / "scratch" / "state").read_text()) >= 1  # saved before it left


def test_a_job_that_is_queued_again_goes_on_at_its_checkpoint(tmp_path: Path, slurm: str) -> None:
    program = toy(tmp_path, steps=40)
    acting = during(program, lambda number: subprocess.run(["scontrol", "requeue", number], check=True), step=10)
    seen = run(tmp_path, program)
    acting.join()
    steps = [event["step"] for event in seen if event["kind"] == "progress"]
    assert steps == list(range(1, 41))
    begun = [path.name for path in (program[2] / "output").glob("begun-*")]
    assert begun != ["begun-0"]
    assert len(begun) == 1  # what the first start had half made is gone
    assert not Path(program[1].failure).exists()


def test_a_job_saves_before_its_time_limit_and_is_queued_again(tmp_path: Path, slurm: str) -> None:
    program = toy(tmp_path, steps=40)
    warn = ["scancel", "--signal=USR1", "--batch"]  # what Slurm itself does two minutes before
    acting = during(program, lambda number: subprocess.run([*warn, number], check=True), step=10)
    seen = run(tmp_path, program)
    acting.join()
    assert [event["step"] for event in seen if event["kind"] == "progress"] == list(range(1, 41))
    assert len([text for text in notes(seen) if text.startswith("from ")]) == 2


def test_a_job_that_could_not_save_before_its_time_limit_is_not_queued_for_ever(tmp_path: Path, stand_in: Path) -> None:
    program = toy(tmp_path, steps=10_000)
    (tmp_path / "toy_program.py").write_text(
        (tmp_path / "toy_program.py").read_text().replace('(Path(spec.scratch) / "whole.json").touch()', "pass")
    )
    warn = ["scancel", "--signal=USR1", "--batch"]
    acting = during(program, lambda number: subprocess.run([*warn, number], check=True))
    with pytest.raises(ProgramFailed, match="ended by SIGTERM") as caught:
        run(tmp_path, program)
    acting.join()
    assert caught.value.retried  # by the flow, which counts


def test_what_the_flow_runs_under_does_not_steer_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_CPUS_PER_TASK",
        "NNODES",
        "CUDA_VISIBLE_DEVICES",
        "SLURM_CONF",
        "SBATCH_ACCOUNT",
    ):
        monkeypatch.setenv(name, "1")
    kept = environment()
    assert {"SLURM_CONF", "SBATCH_ACCOUNT"} <= kept.keys()
    assert not {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "NNODES", "CUDA_VISIBLE_DEVICES"} & kept.keys()


def test_a_machine_without_slurm_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = problems("launcher")
    assert str(problem) == (
        "launcher: slurm: sbatch does not work here: sbatch is not installed. "
        "Start the run where sbatch works, or use launcher: local."
    )


def test_options_that_would_not_arrive_are_refused() -> None:
    wrong = {"--partition": "gpu", "job-name": "x", "time": 86400, "comment": "two\nlines", "nodes": 2, "gpus": [1]}
    found = {name: f"{rule}. {cure}" for name, rule, cure in slurm_problems(wrong)}
    assert found.keys() == wrong.keys()
    assert 'Quote it: time: "24:00:00"' in found["time"]
    assert "set nnodes instead" in found["nodes"]
    assert list(slurm_problems({"partition": "gpu", "time": "24:00:00", "exclusive": True, "cpus-per-task": 8})) == []
