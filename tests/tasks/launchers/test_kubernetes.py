"""A program that Kubernetes starts, on a stand-in of kubectl that really runs the containers' command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.launch import PROJECT, ProgramFailed, run_program
from tasks.launchers.job import Cluster, Job, job_name, read_left
from tasks.launchers.kubernetes import Kubernetes, end, problems
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

OPTIONS: dict[str, Any] = {"image": "llamatuner", "claim": "shared", "mount_path": "/", "secret": "tokens"}


@pytest.fixture(autouse=True)
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """kubectl, played by a file of ours, and a Secret in its cluster."""
    commands(tmp_path, Path(__file__).with_name("stand_in_kubectl.py"), ("kubectl",))
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "secrets.json").write_text(json.dumps({"tokens": {"TOKEN": "secret-7"}}))
    monkeypatch.setenv("STAND_IN", str(tmp_path / "cluster"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{PROJECT}")
    yield from nothing_left(tmp_path)


def run(folder: Path, program: tuple[str, Spec, Path], **arguments: Any) -> list[dict[str, Any]]:
    """Run a program to its end; what it told."""
    seen: list[dict[str, Any]] = []
    options = OPTIONS | arguments.pop("options", {})
    launcher = Kubernetes(Cluster("kubernetes", options, str(folder / "home")), look=0.3)
    run_program(*program, seen.append, deadline=2 * WAIT_SECONDS, launcher=launcher, **arguments)
    return seen


def during(program: tuple[str, Spec, Path], act: Callable[[], Any], step: int = 3) -> threading.Thread:
    """Do something when the program has made some steps."""

    def wait_and_act() -> None:
        wait_for(lambda: len(events_of(program[1], "progress")) >= step, f"step {step}")
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def test_the_manifest_says_all_that_is_needed_and_nothing_secret() -> None:
    folder = Path("/shared/home/work/train-0123456789ab")
    options = OPTIONS | {"mount_path": "/shared", "resources": {"limits": {"nvidia.com/gpu": 8}}, "namespace": "ml"}
    cluster = Cluster("kubernetes", options | {"pod": {"priorityClassName": "high"}}, "/shared/home")
    spec = Spec({}, {}, {}, "", "", "", "")
    text = Kubernetes(cluster).job_file(Job("tasks.train.program", spec, folder, 8, Nodes(2)))
    manifest, name = yaml.safe_load(text), job_name(folder)
    assert manifest["metadata"] == {"name": name, "namespace": "ml"}
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (1, 2, 2, 0)
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["priorityClassName"]) == ("Never", "high")
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "shared"}
    (container,) = pod["containers"]
    given = ["--machines=2", "--processes=8", "tasks.train.program", f"{folder}/spec.json"]
    assert container["command"] == ["python", "-m", "tasks.launchers.machine", *given]
    assert container["env"] == [
        {"name": "LLAMATUNER_HOME", "value": "/shared/home"},
        {"name": "MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "MASTER_PORT", "value": "29500"},
    ]
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert len(f"{name}-node-0-1000") <= 63  # a name in DNS


def test_a_program_runs_in_pods_and_tells_what_it_does(tmp_path: Path) -> None:
    program = toy(tmp_path)
    seen = run(tmp_path, program)
    assert [event["step"] for event in seen if event["kind"] == "progress"] == [1, 2, 3, 4, 5]
    assert (program[2] / "output" / "made").read_text() == "5"
    assert "counted" in (program[2] / "program.log").read_text()
    assert any("token secret-7" in text for text in notes(seen))  # of the Secret
    assert not any("secret-7" in (program[2] / name).read_text() for name in ("job.yaml", "spec.json"))
    assert read_left(program[2]) is None
    assert list((tmp_path / "cluster").glob("llamatuner-*.json")) == []  # deleted


@pytest.mark.slow
def test_the_processes_of_two_pods_meet_and_each_pod_has_its_own_folder(tmp_path: Path) -> None:
    body = """
    import os
    from pathlib import Path
    from tasks.program import main
    def work(spec, events):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        values = ",".join(os.environ[name] for name in names)
        Path(spec.output, f"rank-{os.environ['RANK']}").write_text(values)
        events.emit("note", text=values)
    main(work)
    """
    program = toy(tmp_path, body)
    seen = run(tmp_path, program, processes=2, nodes=Nodes(2))
    work = program[2]
    found = {path.name: path.read_text() for path in (work / "output").iterdir()}
    assert found == {"rank-0": "0,4,0,2,0", "rank-1": "1,4,1,2,0"}
    found = {path.name: path.read_text() for path in (work / "machine-1" / "output").iterdir()}
    assert found == {"rank-2": "2,4,0,2,1", "rank-3": "3,4,1,2,1"}
    assert [text for text in notes(seen) if text[0].isdigit()] == ["0,4,0,2,0"]  # told once, by the first machine


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("raise ProgramError('not_finite', 'loss is not finite at step 3')", "not_finite", "loss is not finite"),
        ("import os; os._exit(7)", "unexpected", "exit code 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "signal 9"),
    ],
)
def test_the_cause_of_a_failure_is_found(tmp_path: Path, body: str, kind: str, words: str) -> None:
    text = f"from tasks.program import ProgramError, main\ndef work(spec, events):\n    {body}\nmain(work)\n"
    with pytest.raises(ProgramFailed, match=words) as caught:
        run(tmp_path, toy(tmp_path, text))
    assert caught.value.kind == kind


def test_a_stop_request_deletes_the_jobset_whose_program_saves_first(tmp_path: Path) -> None:
    program, stop = toy(tmp_path, steps=10_000), threading.Event()
    acting = during(program, stop.set)
    with pytest.raises(Interrupted):
        run(tmp_path, program, stop=stop)
    acting.join()
    assert int((program[2] / "scratch" / "state").read_text()) >= 3
    assert read_left(program[2]) is None


def test_a_jobset_that_somebody_deletes_is_tried_again(tmp_path: Path) -> None:
    program = toy(tmp_path, steps=10_000)
    delete = ["kubectl", "delete", "jobsets.jobset.x-k8s.io", job_name(program[2])]
    acting = during(program, lambda: subprocess.run(delete, check=True))
    with pytest.raises(ProgramFailed) as caught:
        run(tmp_path, program)
    acting.join()
    assert caught.value.retried


@pytest.mark.parametrize("same", [True, False])
def test_the_jobset_of_a_flow_that_was_killed_is_taken_over_if_it_does_the_same(tmp_path: Path, same: bool) -> None:
    program = toy(tmp_path, steps=50)
    made = f"Kubernetes(Cluster('kubernetes', {OPTIONS}, {str(tmp_path / 'home')!r}), look=0.3)"
    flow = start_flow(made, *program)
    wait_for(lambda: events_of(program[1], "progress"), "the first step")
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    seen = run(tmp_path, program if same else toy(tmp_path, steps=40))
    begun = [text for text in notes(seen) if text.startswith("from ")]
    assert ("it is taken over" in notes(seen)[0]) == same
    assert begun[0].startswith("from 0,") == same  # the other went on where the first had saved before it left
    assert len(begun) == 1


def test_the_job_of_a_flow_that_was_killed_can_be_ended(tmp_path: Path) -> None:
    program = toy(tmp_path, steps=10_000)
    made = f"Kubernetes(Cluster('kubernetes', {OPTIONS}, {str(tmp_path / 'home')!r}), look=0.3)"
    flow = start_flow(made, *program)
    wait_for(lambda: events_of(program[1], "progress"), "the first step")
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    end(program[2])
    assert read_left(program[2]) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": "missing"}, r"pod .*-node-0-0 cannot start: ImagePullBackOff: Back-off pulling image"),
        ({"namespace": "forbidden"}, r"Kubernetes refuses .*job.yaml: .*is forbidden"),
    ],
)
def test_what_waiting_does_not_help_is_not_waited_for(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ProgramFailed, match=words) as caught:
        run(tmp_path, toy(tmp_path), options=options)
    assert not caught.value.retried


def test_a_machine_without_kubectl_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster("kubernetes", OPTIONS, "/home")
    assert problems(cluster, "launcher") == []
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = problems(cluster, "launcher")
    assert "kubectl cannot ask for JobSets in namespace default: kubectl is not installed" in str(problem)
