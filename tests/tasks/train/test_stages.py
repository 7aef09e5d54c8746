"""rm, dpo, kto and orpo on a tiny model: what a step of each is worth, and what it does not depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from registry.records import TrainSettings
from tasks.program import Events, ProgramError, Spec
from tasks.train.program import work
from tasks.training_estimate import MEASURED
from tests.tasks.train.test_training import DyingEvents, Killed
from tests.tiny import pack_rows, random_pairs, random_rows, read_lines, tiny_model, write_shards, write_spec

torch.set_num_threads(1)
ROWS = 6
LN2 = math.log(2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("stages") / "base")


def shards(folder: Path, stage: str, rows: int = ROWS) -> Path:
    if folder.exists():
        return folder
    if stage in ("pt", "sft"):
        return write_shards(folder, random_rows(rows, seed=rows))
    if stage == "kto":
        return write_shards(folder, random_rows(rows), "labelled", [number % 3 != 0 for number in range(rows)])
    return write_shards(folder, random_pairs(rows), "preference")


def train(folder: Path, base: Path, stage: str, die_at: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """Train a few steps; the line of every step."""
    inputs = {"base": base, "shards": shards(folder.parent / f"shards-{stage}", stage)}
    others = ("adapter", "reference", "checkpoint", "checkpoint_weights")
    inputs |= {name: fields.pop(name) for name in others if name in fields}
    sets = fields.pop("held_out", {})
    inputs |= {f"held_out.{number}": folder for number, folder in enumerate(sets.values())}
    runtime = {"logging_steps": 1, "save_steps": 2, "save_total_limit": 2, "base_name": "tiny"}
    runtime |= {"sets": list(sets), "per_device_eval_batch_size": fields.pop("per_device_eval_batch_size", 2)}
    settings = {"stage": stage, "learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 2} | fields
    spec = write_spec(
        folder,
        {"train": TrainSettings(**settings).identity(), "packing": False, "base_digest": "base-0"},
        inputs,
        runtime,
    )
    events = DyingEvents(folder / "events.jsonl", die_at) if die_at else Events(folder / "events.jsonl")
    work(Spec.read(spec), events)
    return read_lines(folder / "scratch" / "metrics.jsonl")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_before_the_first_step_the_policy_is_its_reference(base: Path, tmp_path: Path, method: str) -> None:
    first = train(tmp_path / "run", base, "dpo", finetuning_type=method)[0]
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["rewards/accuracies"] == 0.0  # equal is not right


def test_an_adapter_that_is_continued_is_its_own_reference(base: Path, tmp_path: Path) -> None:
    train(tmp_path / "sft", base, "orpo")
    lines = train(tmp_path / "dpo", base, "dpo", adapter=tmp_path / "sft" / "output")
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert lines[0]["rewards/margins"] == 0.0
    assert lines[2]["rewards/margins"] > 0.0
    saved = load_file(tmp_path / "dpo" / "output" / "adapter_model.safetensors")
    assert not any("reference" in name for name in saved)


def test_another_reference_model_is_not_the_policy(base: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", seed=1)
    assert train(tmp_path / "run", base, "dpo", reference=other)[0]["loss"] != pytest.approx(LN2, abs=1e-3)


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo", "rm"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_few_steps_make_the_preferred_answers_more_likely(
    base: Path, tmp_path: Path, stage: str, method: str
) -> None:
    lines = train(tmp_path / "run", base, stage, max_steps=9, finetuning_type=method)
    assert lines[-1]["loss"] < lines[0]["loss"]
    if stage != "kto":
        assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo", "rm"])
def test_a_step_does_not_depend_on_how_it_is_split(base: Path, tmp_path: Path, stage: str) -> None:
    more = {"rm": {"center_rewards_coefficient": 0.1}, "orpo": {}}
    fields: dict[str, Any] = {"max_steps": 4} | more.get(stage, {"pref_ftx": 0.5})
    ways = {
        "4 x 1": {"per_device_train_batch_size": 4},
        "2 x 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "1 x 4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    }
    found = {name: train(tmp_path / name, base, stage, **fields, **way) for name, way in ways.items()}
    for name, lines in found.items():
        for line, wanted in zip(lines, found["1 x 4"], strict=True):  # 6 rows: every second step is short
            for value in set(line) - set(MEASURED):
                assert line[value] == pytest.approx(wanted[value], rel=2e-4, abs=1e-5), (name, value, line["step"])


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "rm"])
def test_held_out_loss_is_the_same_in_any_batches_and_changes_no_step(base: Path, tmp_path: Path, stage: str) -> None:
    sets = {name: shards(tmp_path / name, stage, rows) for name, rows in (("one", 5), ("two", 3))}
    alone = train(tmp_path / "alone", base, stage)
    small = train(tmp_path / "small", base, stage, held_out=sets, eval_steps=2, per_device_eval_batch_size=1)
    large = train(tmp_path / "large", base, stage, held_out=sets, eval_steps=2, per_device_eval_batch_size=8)
    assert [line["loss"] for line in alone] == [line["loss"] for line in small] == [line["loss"] for line in large]
    pairs = ["eval_rewards/accuracies", "eval_rewards/margins"] if stage in ("dpo", "rm") else []
    names = ["eval_loss", "eval_loss/one", "eval_loss/two", *pairs]
    # the last step is measured too
    assert [sorted(name for name in line if "eval" in name) for line in small] == [[], names, names]
    for line, other in zip(small[1:], large[1:], strict=True):
        for name in names:
            assert line[name] == pytest.approx(other[name], rel=1e-5)
    if stage in ("dpo", "rm"):  # counted in pairs: 5 and 3
        for line in small[1:]:
            assert line["eval_loss"] == pytest.approx((5 * line["eval_loss/one"] + 3 * line["eval_loss/two"]) / 8)


def test_the_best_weights_are_kept_and_training_ends_when_nothing_gets_better(base: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"held_out": {"x": shards(tmp_path / "x", "sft", 4)}, "eval_steps": 1, "max_steps": 40}
    fields |= {"learning_rate": 0.05, "early_stopping_steps": 3, "load_best_model_at_end": True}
    lines = train(tmp_path / "run", base, "sft", **fields)
    values = [line["eval_loss"] for line in lines]
    best = values.index(min(values)) + 1
    assert len(lines) == best + 3 < 40  # three measurements without a better one
    numbers = json.loads((tmp_path / "run" / "output" / "train.json").read_text())
    assert (numbers["best_step"], numbers["best_eval_loss"]) == (best, min(values))
    kept = tmp_path / "run" / "scratch" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"
    saved = tmp_path / "run" / "output" / "adapter_model.safetensors"
    assert saved.read_bytes() == kept.read_bytes()
    # a kill behind the last step: the run ends as before, and makes no step more
    before = saved.read_bytes()
    assert train(tmp_path / "run", base, "sft", **fields) == lines
    assert saved.read_bytes() == before


def test_the_best_weights_are_those_of_the_metric_that_is_named(base: Path, tmp_path: Path) -> None:
    sets = {"x": shards(tmp_path / "x", "dpo", 6)}
    fields: dict[str, Any] = {"held_out": sets, "eval_steps": 1, "max_steps": 12, "learning_rate": 0.05}
    fields |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/accuracies"}
    lines = train(tmp_path / "run", base, "dpo", **fields)
    accuracies = [line["eval_rewards/accuracies"] for line in lines]
    losses = [line["eval_loss"] for line in lines]
    best = accuracies.index(max(accuracies)) + 1
    assert best < losses.index(min(losses)) + 1  # of equal ones the first
    numbers = json.loads((tmp_path / "run" / "output" / "train.json").read_text())
    assert (numbers["best_step"], numbers["best_eval_rewards/accuracies"]) == (best, max(accuracies))
    kept = tmp_path / "run" / "scratch" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"
    assert (tmp_path / "run" / "output" / "adapter_model.safetensors").read_bytes() == kept.read_bytes()


def test_a_run_resumed_behind_its_best_step_goes_on_from_the_last_and_keeps_the_best(
    base: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"held_out": {"x": shards(tmp_path / "x", "sft", 4)}, "eval_steps": 1, "max_steps": 40}
    fields |= {"learning_rate": 0.05, "early_stopping_steps": 3, "load_best_model_at_end": True}
    lines = train(tmp_path / "whole", base, "sft", **fields)
    best = len(lines) - 3
    with pytest.raises(Killed):
        train(tmp_path / "killed", base, "sft", die_at=best + 3, **fields)
    again = train(tmp_path / "killed", base, "sft", **fields)
    whole, killed = (tmp_path / name / "output" for name in ("whole", "killed"))
    assert json.loads((killed / "report" / "resume.json").read_text())["resumed_from"] == (best + 2) // 2 * 2 > best
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    for name in ("adapter_model.safetensors", "train.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("good", [True, False])
def test_answers_that_are_all_good_or_all_bad_cost_half_at_the_start_and_stay_finite(
    base: Path, tmp_path: Path, good: bool
) -> None:
    write_shards(tmp_path / "shards-kto", random_rows(3), "labelled", [good] * 3)
    lines = train(tmp_path / "run", base, "kto", max_steps=4)  # steps of 2 rows and of 1
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["loss"] < 0.5


def test_a_pair_of_equal_answers_costs_ln_two_moves_nothing_and_is_not_right(base: Path, tmp_path: Path) -> None:
    row = random_rows(1)[0]
    write_shards(tmp_path / "shards-rm", [pack_rows([row, row])] * 2, "preference")
    (line,) = train(tmp_path / "run", base, "rm", max_steps=1, finetuning_type="full", weight_decay=0.0)
    assert line["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert line["rewards/accuracies"] == line["rewards/margins"] == 0.0
    assert line["grad_norm"] == pytest.approx(0.0, abs=1e-6)


# 6 rows in steps of 2: 3 steps an epoch; killed in the middle of the second one, behind the checkpoint of step 4.
# The other pairs of stage and method are in test_kills.
@pytest.mark.parametrize(("stage", "method"), [("dpo", "lora"), ("kto", "full"), ("orpo", "lora"), ("rm", "full")])
def test_a_killed_and_resumed_stage_has_the_bytes_of_one_never_killed(
    base: Path, tmp_path: Path, stage: str, method: str
) -> None:
    fields: dict[str, Any] = {"finetuning_type": method, "max_steps": 7}
    fields |= {"lora_dropout": 0.2} if method == "lora" else {}
    train(tmp_path / "whole", base, stage, **fields)
    with pytest.raises(Killed):
        train(tmp_path / "killed", base, stage, die_at=6, **fields)
    train(tmp_path / "killed", base, stage, **fields)
    whole, killed = (tmp_path / name / "output" for name in ("whole", "killed"))
    assert (killed / "report" / "resume.json").read_text() == '{\n  "resumed_from": 4\n}\n'
    for path in (path for path in whole.iterdir() if path.is_file()):
        assert (killed / path.name).read_bytes() == path.read_bytes(), path.name


def test_one_marked_answer_cannot_be_compared(base: Path, tmp_path: Path) -> None:
    shards(tmp_path / "shards-kto", "kto", rows=1)
    with pytest.raises(ProgramError, match="there is one row only"):
        train(tmp_path / "run", base, "kto")
