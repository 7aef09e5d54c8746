"""What a named checkpoint folder must hold, said before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from registry.records import TrainSettings
from tasks.train.checkpoints import mark_whole, required_files
from tasks.train.given import require_checkpoint

WHERE = "stages.sft.resume_from_checkpoint"
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def checkpoint(folder: Path, *names: str, step: int = 4) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("x")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def adapter(folder: Path, *names: str, step: int = 4) -> Path:
    return checkpoint(folder, "adapter_model.safetensors", "adapter_config.json", *names, step=step)


def why(folder: Path, exact: bool = True, **fields: Any) -> str:
    settings = TrainSettings(**fields).identity()
    with pytest.raises(InputError) as error:
        require_checkpoint(folder, settings, exact, range(settings["nproc_per_node"]), WHERE)
    assert all(problem.where == WHERE and problem.cure for problem in error.value.problems)
    return str(error.value)


def test_a_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", *STATES)
    require_checkpoint(folder, TrainSettings(max_steps=5).identity(), True, range(1), WHERE)
    mark_whole(folder, required_files(range(1), 1))
    require_checkpoint(folder, TrainSettings().identity(), True, range(1), WHERE)
    two = adapter(tmp_path / "b", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth")
    require_checkpoint(two, TrainSettings(nproc_per_node=2).identity(), True, range(2), WHERE)
    full = checkpoint(tmp_path / "c", "model.safetensors", *STATES)
    require_checkpoint(full, TrainSettings(finetuning_type="full").identity(), True, range(1), WHERE)
    require_checkpoint(adapter(tmp_path / "d"), TrainSettings().identity(), False, range(1), WHERE)


def test_everything_an_exact_resume_lacks_is_named(tmp_path: Path) -> None:
    text = why(adapter(tmp_path / "a", "scheduler.pt"))
    assert "lacks optimizer.pt (the optimizer), rng_state.pth (the random states)" in text
    assert "or set resume: weights_only" in text
    assert "lacks scheduler.pt (the schedule), without" in why(adapter(tmp_path / "b", "optimizer.pt", "rng_state.pth"))


@pytest.mark.parametrize(("written", "processes"), [(1, 2), (2, 1), (2, 4)])
def test_another_number_of_processes_is_refused_with_both(tmp_path: Path, written: int, processes: int) -> None:
    names = ["rng_state.pth"] if written == 1 else [f"rng_state_{rank}.pth" for rank in range(written)]
    text = why(adapter(tmp_path / "a", "optimizer.pt", "scheduler.pt", *names), nproc_per_node=processes)
    words = {1: "1 process", 2: "2 processes", 4: "4 processes"}
    assert f"was written by {words[written]}, this run has {processes}. Set nproc_per_node: {written}, or" in text


@pytest.mark.parametrize("exact", [True, False])
def test_a_finished_model_is_started_from_and_not_resumed(tmp_path: Path, exact: bool) -> None:
    for name, setting in (("adapter_model.safetensors", "adapter_name_or_path"), ("model.safetensors", "model_name")):
        folder = checkpoint(tmp_path / name, name)
        (folder / "trainer_state.json").unlink()
        text = why(folder, exact)
        assert "is a finished" in text
        assert f"To start from it, set {setting}" in text


def test_a_folder_of_checkpoints_and_other_folders_are_told_apart(tmp_path: Path) -> None:
    for step in (10, 9):
        adapter(tmp_path / "run" / f"checkpoint-{step}", *STATES)
    text = why(tmp_path / "run")
    assert "run holds checkpoint-9, checkpoint-10. Name one of them: " in text
    assert f"{tmp_path / 'run' / 'checkpoint-10'}." in text
    assert "is not a folder" in why(tmp_path / "nowhere")
    assert "has no weights (adapter_model.safetensors or model.safetensors)" in why(checkpoint(tmp_path / "none"))
    assert "weights in pytorch_model.bin, which can run code" in why(checkpoint(tmp_path / "bin", "pytorch_model.bin"))


def test_a_checkpoint_of_the_other_method_is_refused(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "a", *STATES), checkpoint(tmp_path / "b", "model.safetensors", *STATES)
    assert "holds an adapter, finetuning_type full and freeze train a whole model" in why(one, finetuning_type="full")
    assert "holds a whole model, finetuning_type lora trains an adapter" in why(other, exact=False)


def test_a_checkpoint_at_or_behind_the_end_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", *STATES)
    for most in (3, 4):
        assert f"has 4 steps behind it, and max_steps is {most}: nothing is left to do" in why(folder, max_steps=most)
    require_checkpoint(folder, TrainSettings(max_steps=4).identity(), False, range(1), WHERE)


def test_a_damaged_or_unreadable_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", *STATES)
    mark_whole(folder, required_files(range(1), 1))
    (folder / "optimizer.pt").write_text("xxx")
    assert "is damaged: optimizer.pt does not have the 1 bytes it had" in why(folder)
    for text in ("{", "[]", "{}", '{"global_step": -1}', '{"global_step": true}'):
        bad = adapter(tmp_path / text, *STATES)
        (bad / "trainer_state.json").write_text(text)
        assert "does not say its step" in why(bad)
