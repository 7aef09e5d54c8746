"""A machine of a cluster's job has a folder of its own, and the cause of a failure is found in whichever it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tasks.launch import ProgramFailed, run_program
from tasks.launchers.job import Ended, Job, Say
from tasks.launchers.machine import prepare, rank_of
from tasks.program import Spec
from tests.tasks.launchers.ground import toy


def test_the_number_of_a_machine_is_what_its_cluster_says() -> None:
    assert [rank_of({name: "3"}) for name in ("SLURM_NODEID", "JOB_COMPLETION_INDEX", "NODE_RANK")] == [3, 3, 3]
    assert rank_of({}) == 0


def test_every_machine_writes_into_a_folder_of_its_own_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    _, spec, work = toy(tmp_path)
    path = work / "spec.json"
    path.write_text(json.dumps(spec.__dict__))
    for name in ("output/half", "scratch/checkpoint"):
        (work / name).touch()
    Path(spec.events).write_text("told\n")
    Path(spec.failure).write_text("{}")
    assert prepare(path, 0) == path  # a job that is started again
    assert not (work / "output" / "half").exists()
    assert (work / "scratch" / "checkpoint").exists()
    assert Path(spec.events).read_text() == "told\n"
    assert not Path(spec.failure).exists()
    other = Spec.read(prepare(path, 2))
    own = {Path(place).parent for place in (other.output, other.scratch, other.events, other.failure)}
    assert own == {work / "machine-2"}
    assert (other.settings, other.inputs) == (spec.settings, spec.inputs)
    (Path(other.scratch) / "checkpoint").touch()
    prepare(path, 2)
    assert (Path(other.scratch) / "checkpoint").exists()


class Failing:
    """A launcher whose program fails on two machines: the first lost the second, which knows why."""

    def launch(self, job: Job, say: Say) -> Failing:
        job.write()
        second = job.folder / "machine-1"
        second.mkdir()
        words = {"kind": "unexpected", "message": "Connection closed by peer"}
        Path(job.spec.failure).write_text(json.dumps(words))
        (second / "failure.json").write_text(json.dumps({"kind": "out_of_memory", "message": "CUDA out of memory"}))
        os.utime(job.spec.failure, (1, 1))
        return self

    def wait(self, seconds: float) -> Ended | None:
        return Ended(1)

    def logs(self) -> str:
        return ""

    def cancel(self) -> None:
        return


def test_what_made_the_others_leave_is_the_cause(tmp_path: Path) -> None:
    module, spec, work = toy(tmp_path)
    with pytest.raises(ProgramFailed, match="CUDA out of memory") as caught:
        run_program(module, spec, work, print, launcher=Failing())
    assert caught.value.kind == "out_of_memory"
