"""A recipe on a cluster: what would be started is shown, what is missing is said first, and a run does it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.graph import build
from flows.launching import jobs_without_run
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from tasks.launchers.job import write_left
from tasks.locks import locked
from tests.flows.toy import run, states, toy_recipe
from tests.tasks.launchers.ground import commands, nothing_left

LAUNCHERS = Path(__file__).parents[1] / "tasks" / "launchers"
KUBERNETES = {"image": "llamatuner", "claim": "shared", "mount_path": "/elsewhere"}


def on_cluster(folder: Path, launcher: str, evaluation: bool = False, **stage: Any) -> Path:
    """A recipe whose programs are jobs."""
    path = toy_recipe(folder / "recipe", **({"nproc_per_node": 1} | stage))
    raw = json.loads(path.read_text())
    if not evaluation:
        raw.pop("evaluation")
    raw |= {"launcher": launcher, "slurm": {"partition": "debug"}, "kubernetes": KUBERNETES}
    path.write_text(json.dumps(raw))
    return path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in of Slurm's commands."""
    names = ("sbatch", "srun", "squeue", "scancel", "scontrol")
    commands(tmp_path, LAUNCHERS / "stand_in_slurm.py", names)
    (tmp_path / "jobs").mkdir()
    monkeypatch.setenv("STAND_IN", str(tmp_path / "jobs"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    yield from nothing_left(tmp_path)


def test_all_programs_that_compute_with_a_model_are_jobs_and_take_no_device_here(tmp_path: Path) -> None:
    recipe = on_cluster(tmp_path, "slurm", evaluation=True, nnodes=2)
    pipeline = build(load_recipe(str(recipe)), Home.open())
    jobs = {step.title for step in pipeline.steps if step.cluster}
    assert jobs == {"sft/train", "sft/merge", "sft/evaluate", "base/evaluate"}
    assert not any(step.devices for step in pipeline.steps)
    assert pipeline.stages["sft"].trained.cluster == next(step.cluster for step in pipeline.steps if step.cluster)
    here = build(load_recipe(str(recipe), ["launcher=local", "stages.sft.nnodes="]), Home.open())
    assert not any(step.cluster for step in here.steps)


@pytest.mark.parametrize(
    ("overrides", "environment", "words"),
    [
        (["stages.sft.nproc_per_node="], {}, "stages.sft.nproc_per_node: launcher slurm: this machine does not know"),
        ([], {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "x"}, "NNODES: launcher slurm deals out machines itself"),
        (["launcher=local"], {}, "nnodes has no effect with launcher local. Remove it, or use launcher: slurm or kub"),
        (["slurm.time=24:00:00"], {}, "slurm.time: 86400 is a number; YAML makes one of 24:00:00. Quote it"),
        (["kubernetes.image="], {}, "kubernetes.image: missing, and it has no default"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], environment: dict[str, str], words: str
) -> None:
    recipe = on_cluster(tmp_path, "slurm", nnodes=2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        build(load_recipe(str(recipe), overrides), Home.open())
    assert words in str(caught.value)


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    recipe, path = str(on_cluster(tmp_path, "slurm")), str(tmp_path)
    told = json.dumps(run("run", recipe, code=2, PATH=path))
    assert "launcher: slurm: sbatch does not work here: sbatch is not installed" in told
    told = json.dumps(run("run", recipe, "--set", "launcher=kubernetes", code=2, PATH=path))
    assert "kubectl is not installed" in told
    assert "is not under mount_path /elsewhere" in told
    assert not Home.default().work.exists()


def test_a_job_whose_run_died_is_told_of_by_the_next_one(tmp_path: Path) -> None:
    home = Home.open()
    folder = home.work / "train-0123456789ab"
    folder.mkdir(parents=True)
    write_left(folder, launcher="slurm", name="llamatuner-train", id="12", digest="")
    assert jobs_without_run(home) == ["slurm job llamatuner-train (12) works in work/train-0123456789ab"]
    with locked(home.locks / "0123456789abcdef.lock"):  # as its run does
        assert jobs_without_run(home) == []


@pytest.mark.slow
def test_a_recipe_runs_in_jobs_on_two_machines_as_it_was_shown(tmp_path: Path, slurm: None) -> None:
    recipe = str(on_cluster(tmp_path, "slurm", nnodes=2))
    shown = run("plan", recipe, "--show-launch")["steps"]
    (train,) = [step for step in shown if step["step"] == "train"]
    assert "--machines=2 --processes=1 tasks.train.program" in train["launch"]
    run("prepare", recipe)
    (train,) = [step for step in run("plan", recipe, "--show-launch")["steps"] if step["step"] == "train"]
    answer = run("run", recipe)
    assert answer["status"] == "completed"
    assert set(states(answer).values()) == {"cached", "ran"}
    jobs = [json.loads(path.read_text()) for path in (tmp_path / "jobs").glob("*.json")]
    assert len(jobs) == 2  # train and merge
    assert train["launch"] in [job["text"] for job in jobs]
