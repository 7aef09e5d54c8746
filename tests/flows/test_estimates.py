"""What `plan` says about training steps before they run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from flows.estimates import memory_notes
from flows.graph import build
from flows.planning import PlannedStep, plan
from flows.view import details, numbers
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Store
from tasks.devices import cuda_devices
from tasks.sequences import TokenizedSequences
from tasks.training_estimate import MEMORY_FILE, memory_sentence
from tests.flows.test_artifacts_cli import ask, make_data
from tests.flows.test_chains import write_pairs

# 264 x 32 + 2 x (2 x 32 x 32 + 2 x 16 x 32 + 3 x 32 x 64 + 2 x 32) + 32, the model of the toy recipe
PARAMETERS = 27040


def lines(recipe: Path, *settings: str) -> dict[str, PlannedStep]:
    home = Home.open()
    return {line.step.title: line for line in plan(build(load_recipe(str(recipe), settings), home), Store(home))}


def test_before_the_rows_are_there_an_estimate_is_a_bound(folder: Path) -> None:
    planned = lines(folder / "toy.json")
    estimate = planned["sft/train"].estimate
    assert estimate is not None
    assert estimate.memory is not None
    assert (estimate.sequences, estimate.tokens, estimate.steps, estimate.at_most) == (None, None, 4, True)
    assert estimate.sentence().startswith("sequences and tokens known after tokenize, 4 steps; memory per device at")
    assert {title for title, line in planned.items() if line.estimate} == {"sft/train"}


def test_behind_tokenized_rows_counts_and_steps_are_exact(folder: Path) -> None:
    bound = lines(folder / "toy.json")["sft/train"].estimate
    make_data(folder / "toy.json", "stages.sft.max_steps=-1")
    planned = lines(folder / "toy.json", "stages.sft.max_steps=-1", "stages.sft.num_train_epochs=2")
    estimate, shards = planned["sft/train"].estimate, planned["sft/tokenize"].artifact
    assert estimate is not None
    assert bound is not None
    assert estimate.memory is not None
    assert bound.memory is not None
    assert shards is not None
    data = TokenizedSequences(shards.path)
    assert (estimate.sequences, estimate.tokens) == (24, int(data.lengths().sum()))
    assert estimate.tokens == shards.manifest["counts"]["tokens"]
    assert estimate.steps == 2 * 24 // 2
    assert not estimate.at_most
    assert estimate.memory.weights == bound.memory.weights
    assert estimate.memory.activations < bound.memory.activations


def test_the_command_says_the_same_in_words_and_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, "plan", "toy.json")
    found = {f"{step['stage']}/{step['step']}": step["estimate"] for step in answer["steps"]}
    estimate = lines(folder / "toy.json")["sft/train"].estimate
    assert estimate is not None
    assert estimate.memory is not None
    # rank 4: 2 x 4 x (2 x (32 + 32) + 2 x (16 + 32) + 3 x (64 + 32))
    assert estimate.memory.weights == 4 * PARAMETERS + 4 * 4096
    assert found.pop("sft/train") == {
        "sequences": None,
        "tokens": None,
        "steps": 4,
        "at_most": True,
        "devices": 1,
        "memory_gib": estimate.memory.as_json(),
    }
    assert set(found.values()) == {None}
    assert answer["notes"] == []
    assert run_app(["plan", "toy.json"]) == 0
    assert "4 steps; memory per device at most" in capsys.readouterr().out.replace("\n", " ")


def test_a_stage_that_starts_from_another_has_that_ones_shapes_before_they_are_there(folder: Path) -> None:
    write_pairs(folder / "pairs.jsonl", 6, "pair")
    raw: dict[str, Any] = json.loads((folder / "toy.json").read_text())
    raw["stages"]["dpo"] = {"stage": "dpo", "model": "sft", "dataset": "pairs.jsonl", "finetuning_type": "full"}
    (folder / "toy.json").write_text(json.dumps(raw))
    estimate = lines(folder / "toy.json")["dpo/train"].estimate
    assert estimate is not None
    assert estimate.memory is not None
    assert estimate.memory.weights == 2 * 4 * PARAMETERS  # the frozen reference beside it


def test_a_stage_that_draws_answers_counts_all_roles_before_any_of_them_is_made(folder: Path) -> None:
    home, settings = Home.open(), [f"model_name_or_path={folder / 'model'}"]
    pipeline = build(load_recipe("sft_rm_ppo", settings), home)
    planned = {line.step.title: line for line in plan(pipeline, Store(home))}
    found = {title: planned[f"{title}/train"].estimate for title in ("sft", "rm", "ppo")}
    sizes = {title: estimate.memory for title, estimate in found.items() if estimate and estimate.memory}
    assert sizes.keys() == found.keys()
    # rank 16, four times that of the toy recipe: the policy's own; the critic's and the reward model's with a head each
    adapters = {title: size.weights - 4 * PARAMETERS for title, size in sizes.items()}
    assert adapters["ppo"] == 3 * 4 * 16 / 4 * 4096 + 2 * 4 * 32


def test_of_a_model_that_is_not_here_no_memory_is_guessed(folder: Path) -> None:
    estimate = lines(folder / "toy.json", "model_name_or_path=smollm2-360m-instruct")["sft/train"].estimate
    assert estimate is not None
    assert estimate.memory is None
    assert estimate.as_json()["memory_gib"] is None
    assert estimate.sentence().endswith("memory known when the model is there")


def test_a_device_that_is_too_small_is_said_with_what_takes_less(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory_notes(list(lines(folder / "toy.json").values())) == []
    tool = tmp_path / "nvidia-smi"  # stands for the driver's tool, not for code of ours
    tool.write_text("#!/bin/sh\nprintf 'GPU-a, NVIDIA T0, 8.0, 1\\n'")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda_devices.cache_clear()
    (note,) = memory_notes(list(lines(folder / "toy.json").values()))
    assert note.startswith("sft/train: training takes at most 0.0 GiB, NVIDIA T0 has 0.0 GiB. If memory runs out: ")
    assert note.endswith(
        "lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor; or "
        "set gradient_checkpointing: true; or set quant_bit: 4; or lower cutoff_len; or use a smaller model."
    )
    raw = json.loads((folder / "toy.json").read_text())
    del raw["stages"]["sft"]["lora_rank"]
    more = {"finetuning_type": "full", "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    raw["stages"]["sft"] |= more
    (folder / "toy.json").write_text(json.dumps(raw))
    (note,) = memory_notes(list(lines(folder / "toy.json").values()))
    assert "use finetuning_type: lora, with quant_bit: 4 for less still" in note
    assert "per_device" not in note


def test_estimated_and_measured_are_said_where_both_are_known(tmp_path: Path) -> None:
    assert memory_sentence(tmp_path) is None
    file = tmp_path / MEMORY_FILE
    file.parent.mkdir()
    file.write_text(json.dumps({"estimated_gib": None, "measured_gib": 2.9}))
    assert memory_sentence(tmp_path) is None
    file.write_text(json.dumps({"estimated_gib": {"total": 3.1}, "measured_gib": 2.9}))
    assert memory_sentence(tmp_path) == "memory: 3.10 GiB estimated, 2.90 GiB measured"


def test_the_live_view_shows_all_numbers_of_a_step() -> None:
    event = {
        "kind": "progress",
        "step": 3,
        "total": 9,
        "loss": 1.5,
        "grad_norm": 0.51234,
        "learning_rate": 0.0002,
        "tokens_per_second": 1234.5,
        "trained_tokens_per_second": 600.4,
        "samples_per_second": 2.345,
        "peak_memory_gib": 2.9,
        "mfu": 0.412,
    }
    assert numbers(event) == "loss 1.500  1,234 tok/s"
    told = "grad norm 0.512  lr 0.0002  600 trained tok/s  2.35 samples/s  peak 2.90 GiB  MFU 41%"
    assert details(event) == told
    assert details({"kind": "progress", "step": 1, "total": 2, "unit": "rows"}) == ""
