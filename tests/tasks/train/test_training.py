"""The training program, on a tiny real model.

One decision: runs that must survive a kill or be spread over processes are real processes; the others call `work`
in this one, because importing torch costs seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from registry.records import TrainSettings
from tasks.program import Events, ProgramError, Spec
from tasks.train.checkpoints import mark_whole, remove_damaged, required_files, rotate
from tasks.train.model import build_model
from tasks.train.output import check_saved_adapter, check_saved_model, save_weights
from tasks.train.processes import newest_common
from tasks.train.program import optional_packages, work
from tests.tiny import pack_rows, random_rows, read_lines, tiny_model, write_shards, write_spec

torch.set_num_threads(1)  # on matrices this small two threads mostly wait for each other
PROJECT = Path(__file__).resolve().parents[3]
ALONE = required_files(range(1), 1)  # of a run of one process
MEASURED = {
    *("loss", "grad_norm", "learning_rate", "tokens_per_second", "trained_tokens_per_second", "samples_per_second"),
    "peak_memory_gib",
}  # of each step, on a device whose peak is not known
GOLDEN = [6.117196, 6.448291, 6.205514, 6.124713]  # float32, seed 42, 12 rows in steps of 2


class Killed(Exception):
    """Stands for a kill in tests that stay in this process."""


class DyingEvents(Events):
    """Events of a run that ends when it tells about a step, before that step's checkpoint."""

    def __init__(self, path: Path, at: int) -> None:
        super().__init__(path)
        self.at = at

    def emit(self, kind: str, **fields: Any) -> None:
        super().emit(kind, **fields)
        if kind == "progress" and fields["step"] == self.at:
            raise Killed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"base": tiny_model(folder / "base"), "shards": write_shards(folder / "shards", random_rows(12))}


def make_spec(
    folder: Path, inputs: dict[str, Path], packing: bool = False, save_steps: int = 100, **train: Any
) -> Path:
    fields = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "num_train_epochs": 2.0}
    settings = {
        "train": TrainSettings(**(fields | train)).identity(),
        "packing": packing,
        "base_digest": "base-0",
    }
    runtime = {"logging_steps": 2, "save_steps": save_steps, "save_total_limit": 2, "base_name": "tiny"}
    return write_spec(folder, settings, inputs, runtime)


def run(path: Path, die_at: int | None = None) -> Path:
    spec = Spec.read(path)
    if die_at is None:
        work(spec, Events(spec.events))
    else:
        with pytest.raises(Killed):
            work(spec, DyingEvents(Path(spec.events), die_at))
    return Path(spec.output)


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_lines(output.parent / "scratch" / "metrics.jsonl")]


def contents(output: Path) -> dict[str, bytes]:
    """All files but those of report/."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


def test_four_steps_have_the_losses_they_always_had(inputs: dict[str, Path], tmp_path: Path) -> None:
    output = run(make_spec(tmp_path, inputs, max_steps=4))
    assert losses(output) == pytest.approx(GOLDEN, abs=1e-4)
    numbers = json.loads((output / "train.json").read_text())
    assert numbers["steps"] == 4
    assert numbers["last_loss"] == numbers["train_loss"] == losses(output)[-1]
    assert numbers["wrapped_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert numbers["trainable_parameters"] == sum(
        value.numel() for value in load_file(output / "adapter_model.safetensors").values()
    )


def test_the_artifact_has_the_bases_tokenizer_its_digest_and_no_path_of_this_machine(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    output = run(make_spec(tmp_path, inputs, max_steps=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (inputs["base"] / name).read_bytes()
    assert json.loads((output / "base.json").read_text()) == {"base_digest": "base-0"}
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert not any(str(inputs["base"].parent).encode() in content for content in contents(output).values())
    assert {path.name for path in (output / "report").iterdir()} == {"metrics.jsonl", "loss.png", "memory.json"}
    assert "training_args.bin" not in {path.name for path in tmp_path.rglob("*")}


def test_events_tell_every_step_and_metrics_every_logged_one(inputs: dict[str, Path], tmp_path: Path) -> None:
    output = run(make_spec(tmp_path, inputs, max_steps=3))
    events = read_lines(tmp_path / "events.jsonl")
    assert events[0]["kind"] == "note"
    assert [event["step"] for event in events if event["kind"] == "progress"] == [1, 2, 3]
    assert {event["total"] for event in events if event["kind"] == "progress"} == {3}
    metrics = [event for event in events if event["kind"] == "metrics"]
    report = read_lines(output / "report" / "metrics.jsonl")
    assert [event["step"] for event in metrics] == [line["step"] for line in report] == [2, 3]
    assert [event["values"]["loss"] for event in metrics] == [line["loss"] for line in report]
    assert all(set(event["values"]) == MEASURED | {"epoch"} for event in metrics)
    shown = {"kind", "step", "total"} | MEASURED
    assert all(set(event) == shown for event in events if event["kind"] == "progress")
    assert any("2 per device x 1 accumulation x 1 process = 2 sequences per step" in e.get("text", "") for e in events)


# 12 rows in steps of 2: 6 steps per epoch. The last whole checkpoint is that of step 8 (in epoch 2), 6 (between), 0.
@pytest.mark.parametrize(("die_at", "method"), [(9, "lora"), (7, "lora"), (2, "lora"), (9, "full")])
def test_a_killed_and_resumed_run_has_the_bytes_of_one_never_killed(
    inputs: dict[str, Path], tmp_path: Path, die_at: int, method: str
) -> None:
    fields: dict[str, Any] = {"finetuning_type": method, "lora_dropout": 0.2, "lr_scheduler_type": "cosine"}
    whole = run(make_spec(tmp_path / "whole", inputs, **fields))
    spec = make_spec(tmp_path / "killed", inputs, save_steps=2, **fields)
    run(spec, die_at=die_at)
    resumed = run(spec)
    assert contents(resumed) == contents(whole)
    assert losses(resumed) == losses(whole)
    if die_at > 2:
        expected = (die_at - 1) // 2 * 2
        assert json.loads((resumed / "report" / "resume.json").read_text()) == {"resumed_from": expected}
        notes = [event["text"] for event in read_lines(tmp_path / "killed" / "events.jsonl") if event["kind"] == "note"]
        assert f"resumed from step {expected}" in notes
    else:
        assert not (resumed / "report" / "resume.json").exists()


def test_a_run_in_smaller_parts_makes_the_same_steps(inputs: dict[str, Path], tmp_path: Path) -> None:
    whole = make_spec(tmp_path / "whole", inputs, per_device_train_batch_size=4, max_steps=4)
    parts = make_spec(tmp_path / "parts", inputs, per_device_train_batch_size=4, max_steps=4)
    spec = json.loads(parts.read_text())
    spec["runtime"]["micro_batch"] = 1
    parts.write_text(json.dumps(spec))
    assert losses(run(parts)) == pytest.approx(losses(run(whole)), rel=1e-5)


def test_a_run_resumed_in_smaller_parts_has_the_same_rows_in_each_step(inputs: dict[str, Path], tmp_path: Path) -> None:
    whole = run(make_spec(tmp_path / "whole", inputs))
    path = make_spec(tmp_path / "killed", inputs, save_steps=2)
    run(path, die_at=9)  # of 12 steps, 6 an epoch: the checkpoint is in the middle of the second
    spec = json.loads(path.read_text())
    spec["runtime"]["micro_batch"] = 1  # 2 x 1 becomes 1 x 2, as when memory ran out
    path.write_text(json.dumps(spec))
    parts = run(path)
    assert json.loads((parts / "report" / "resume.json").read_text()) == {"resumed_from": 8}
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    lines = [read_lines(output.parent / "scratch" / "metrics.jsonl") for output in (parts, whole)]
    assert [line["tokens"] for line in lines[0]] == [line["tokens"] for line in lines[1]]


def test_sigterm_saves_behind_the_step_and_the_run_goes_on_from_there(inputs: dict[str, Path], tmp_path: Path) -> None:
    class Ending(Events):
        def emit(self, kind: str, **fields: Any) -> None:
            super().emit(kind, **fields)
            if kind == "progress" and fields["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = contents(run(make_spec(tmp_path / "whole", inputs, max_steps=6)))
    path = make_spec(tmp_path / "ended", inputs, max_steps=6)
    spec, before = Spec.read(path), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ProgramError, match="the checkpoint of step 4 of 6 was saved first") as failure:
        work(spec, Ending(spec.events))
    signal.signal(signal.SIGTERM, before)
    assert failure.value.kind == "killed"
    assert [folder.name for folder in (tmp_path / "ended" / "scratch" / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert contents(run(path)) == whole


def test_a_run_killed_after_its_last_step_makes_no_further_step(inputs: dict[str, Path], tmp_path: Path) -> None:
    spec = make_spec(tmp_path, inputs, max_steps=4, finetuning_type="full")  # 4 of 6 steps: in the middle of an epoch
    first = contents(run(spec))
    shutil.rmtree(tmp_path / "output")
    assert contents(run(spec)) == first


def test_a_half_written_newest_checkpoint_is_ignored(inputs: dict[str, Path], tmp_path: Path) -> None:
    whole = contents(run(make_spec(tmp_path / "whole", inputs, max_steps=8)))
    spec = make_spec(tmp_path / "killed", inputs, max_steps=8, save_steps=2)
    run(spec, die_at=7)
    root = tmp_path / "killed" / "scratch" / "checkpoints"
    shutil.copytree(root / "checkpoint-6", root / "checkpoint-7", ignore=shutil.ignore_patterns("whole.json"))
    with open(root / "checkpoint-6" / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    assert contents(run(spec)) == whole
    resume = json.loads((tmp_path / "killed" / "output" / "report" / "resume.json").read_text())
    assert resume == {"resumed_from": 4}


def test_a_checkpoint_without_optimizer_state_is_not_whole(tmp_path: Path) -> None:
    def checkpoint(step: int) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "model.safetensors"):
            (folder / name).write_text(name)
        return folder

    for step in (9, 10, 11):
        mark_whole(checkpoint(step), ALONE)
    (tmp_path / "checkpoint-11" / "optimizer.pt").unlink()
    assert newest_common(tmp_path, ALONE) == tmp_path / "checkpoint-10"
    assert newest_common(tmp_path, required_files(range(2), 2)) is None  # the random states of two are not there
    rotate(tmp_path, 1, ALONE)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-11"}
    assert remove_damaged(tmp_path, ALONE) == ["removed checkpoint-11: optimizer.pt does not have the 12 bytes it had"]
    (checkpoint(12) / "scheduler.pt").unlink()
    with pytest.raises(FileNotFoundError, match="scheduler"):
        mark_whole(tmp_path / "checkpoint-12", ALONE)


@pytest.mark.parametrize("tied", [True, False])
def test_full_tuning_saves_a_model_that_loads_to_the_same_weights(tmp_path: Path, tied: bool) -> None:
    base = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    inputs = {"base": base, "shards": write_shards(tmp_path / "shards", random_rows(4))}
    output = run(make_spec(tmp_path / "run", inputs, finetuning_type="full", max_steps=3, learning_rate=1e-3))
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, output))
    saved = load_file(tmp_path / "run" / "scratch" / "checkpoints" / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in saved.items())
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"]) == tied
    assert ("lm_head.weight" in saved) != tied
    assert all(not torch.equal(after[name], before[name]) for name in saved)
    assert (output / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert json.loads((output / "config.json").read_text())["use_cache"] is True


def test_files_that_lack_a_weight_are_noticed(inputs: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs["base"])
    state = load_file(inputs["base"] / "model.safetensors")
    check_saved_model(model, inputs["base"])
    state.pop("model.norm.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ProgramError, match=r"hold 27008 parameters, the model has 27040.*'model\.norm\.weight'"):
        check_saved_model(model, tmp_path)


def test_packed_and_unpacked_rows_are_trained_alike(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = random_rows(4)
    one = write_shards(tmp_path / "one", rows)
    packed = write_shards(tmp_path / "packed", [pack_rows(rows[:3]), pack_rows(rows[3:])])
    plain = run(make_spec(tmp_path / "a", inputs | {"shards": one}, per_device_train_batch_size=4))
    other = run(make_spec(tmp_path / "b", inputs | {"shards": packed}, packing=True))
    assert losses(plain) == pytest.approx(losses(other), rel=1e-5)


def test_the_learning_rate_rises_over_a_share_of_the_steps_or_a_number_of_them(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    made = []
    for name, given in {"share": {"warmup_ratio": 0.5}, "steps": {"warmup_steps": 4, "warmup_ratio": 0.9}}.items():
        output = run(make_spec(tmp_path / name, inputs, max_steps=8, learning_rate=1e-2, **given))
        made.append([line["learning_rate"] for line in read_lines(output / "report" / "metrics.jsonl")])
    assert made[0] == made[1] == pytest.approx([2.5e-3, 7.5e-3, 7.5e-3, 2.5e-3])  # of every other step
    with pytest.raises(ProgramError, match="warmup_steps is 4, and there are 4 optimizer steps"):
        run(make_spec(tmp_path / "many", inputs, max_steps=4, warmup_steps=4))


def test_bf16_keeps_matrices_in_float32_and_learns(inputs: dict[str, Path], tmp_path: Path) -> None:
    output = run(make_spec(tmp_path, inputs, bf16=True))
    assert {value.dtype for value in load_file(output / "adapter_model.safetensors").values()} == {torch.float32}
    assert losses(output)[-1] < losses(output)[0]


def test_an_adapter_is_continued_on_its_own_base_only(inputs: dict[str, Path], tmp_path: Path) -> None:
    first = run(make_spec(tmp_path / "first", inputs, num_train_epochs=4.0))
    more = run(make_spec(tmp_path / "more", inputs | {"adapter": first}, max_steps=1))
    assert losses(more)[0] < losses(first)[0] - 0.3
    (first / "base.json").write_text('{"base_digest": "base-9"}')
    with pytest.raises(ProgramError, match=r"trained on base weights base-9, this base has base-0"):
        run(make_spec(tmp_path / "wrong", inputs | {"adapter": first}, max_steps=1))
    (first / "base.json").write_text('{"base_digest": "base-0"}')
    with pytest.raises(ProgramError, match=r"lora_rank is 4, the adapter has 8"):
        run(make_spec(tmp_path / "rank", inputs | {"adapter": first}, max_steps=1, lora_rank=4, lora_alpha=16))


def test_an_adapter_of_which_a_part_is_lost_is_not_continued(inputs: dict[str, Path], tmp_path: Path) -> None:
    first = run(make_spec(tmp_path / "first", inputs, max_steps=1))
    tensors = load_file(first / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    save_file(tensors, first / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ProgramError, match=r"1 missing: .*layers\.0\.mlp\.up_proj\.lora_B\.weight"):
        run(make_spec(tmp_path / "more", inputs | {"adapter": first}, max_steps=1))


def test_an_adapter_file_that_lacks_what_was_wrapped_is_noticed(inputs: dict[str, Path], tmp_path: Path) -> None:
    settings = TrainSettings(lora_target="q_proj").identity()
    model = build_model(settings, str(inputs["base"]), "base-0", None)
    save_weights(model, tmp_path)
    assert check_saved_adapter(model, tmp_path)["saved_tensors"] == 4
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    empty = {name: torch.empty(0) for name in tensors}  # what a process that holds a part of the weights saves
    for bad, words in (({}, "2 modules were wrapped; missing in the file: ['"), (empty, "empty: ['base_model")):
        save_file(bad, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ProgramError, match=re.escape(words)):
            check_saved_adapter(model, tmp_path)


def test_a_module_name_that_matches_nothing_is_refused_with_the_names_there_are(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    spec = make_spec(tmp_path, inputs, lora_target="q_proj,w_pack")
    with pytest.raises(ProgramError, match=r"lora_target w_pack matches no linear module.*q_proj, up_proj") as error:
        run(spec)
    assert error.value.kind == "bad_setting"


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(inputs: dict[str, Path], tmp_path: Path) -> None:
    spec = make_spec(tmp_path, inputs, learning_rate=1e30, finetuning_type="full", save_steps=1)
    with pytest.raises(ProgramError, match=r"is not finite at step 2: .*Lower learning_rate") as error:
        run(spec)
    assert error.value.kind == "not_finite"
    root = tmp_path / "scratch" / "checkpoints"
    assert newest_common(root, ALONE) == root / "checkpoint-1"
    assert not (tmp_path / "output" / "train.json").exists()


def test_a_program_imports_bitsandbytes_and_deepspeed_only_for_settings_that_need_them(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    plain, quantised = (
        make_spec(tmp_path / name, inputs, **more) for name, more in (("a", {}), ("b", {"quant_bit": 4}))
    )
    assert optional_packages(Spec.read(plain)) == set()
    assert optional_packages(Spec.read(quantised)) == {"bitsandbytes"}
    assert optional_packages(Spec.read(make_spec(tmp_path / "c", inputs, optim="adamw_8bit"))) == {"bitsandbytes"}
    assert optional_packages(Spec.read(make_spec(tmp_path / "d", inputs, deepspeed="zero2"))) == {"deepspeed"}
    script = (
        "from importlib.util import find_spec; from tasks.program import hide; "
        "hide({'bitsandbytes'}); print(find_spec('bitsandbytes'), bool(find_spec('deepspeed')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "None True\n", done.stderr
