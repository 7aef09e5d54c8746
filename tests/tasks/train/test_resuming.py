"""Going on from a checkpoint folder that somebody names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from tasks.program import ProgramError
from tasks.training_estimate import MEASURED
from tests.tasks.train.test_stages import train
from tests.tasks.train.test_training import Killed, contents
from tests.tiny import VOCABULARY, random_rows, read_lines, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
CASES = [("sft", "lora"), ("sft", "full"), ("dpo", "lora")]
STEPS, KEPT = 6, 4  # of 6 rows in steps of 2: the kept one is in the middle of the second epoch
Runs = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("resuming") / "base")


def fields_of(method: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"finetuning_type": method, "max_steps": STEPS, "lr_scheduler_type": "cosine"}
    return fields | ({"lora_dropout": 0.2} if method == "lora" else {})


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Stage and method → the output of a whole run, and a copy of its checkpoint of step 4 under another name."""
    folder, made = tmp_path_factory.mktemp("runs"), dict[tuple[str, str], tuple[Path, Path]]()

    def run(stage: str, method: str) -> tuple[Path, Path]:
        if (stage, method) not in made:
            own = folder / f"{stage}-{method}"
            train(own / "run", base, stage, **fields_of(method))
            shutil.copytree(own / "run" / "scratch" / "checkpoints" / f"checkpoint-{KEPT}", own / "kept")
            made[stage, method] = own / "run" / "output", own / "kept"
        return made[stage, method]

    return run


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def spoiled(kept: Path, folder: Path) -> Path:
    """A copy of a checkpoint, to be changed."""
    return Path(shutil.copytree(kept, folder))


def refusal(base: Path, folder: Path, stage: str = "sft", method: str = "lora", **fields: Any) -> str:
    with pytest.raises(ProgramError) as error:
        train(folder, base, stage, **(fields_of(method) | fields))
    assert error.value.kind == "bad_setting"
    return str(error.value)


@pytest.mark.parametrize(("stage", "method"), CASES)
def test_a_run_from_a_copied_checkpoint_ends_with_the_bytes_of_the_first(
    base: Path, tmp_path: Path, runs: Runs, stage: str, method: str
) -> None:
    output, kept = runs(stage, method)
    first = read_lines(output.parent / "scratch" / "metrics.jsonl")
    again = train(tmp_path / "again", base, stage, checkpoint=kept, **fields_of(method))
    assert timeless(again) == timeless(first)
    assert contents(tmp_path / "again" / "output") == contents(output)
    resume = json.loads((tmp_path / "again" / "output" / "report" / "resume.json").read_text())
    assert resume == {"resumed_from": KEPT}
    events = read_lines(tmp_path / "again" / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "progress"] == [5, 6]
    assert f"resumed from step 4 of {kept}" in [event.get("text") for event in events]


def test_a_kill_of_such_a_run_resumes_from_its_own_newer_checkpoint(base: Path, tmp_path: Path, runs: Runs) -> None:
    fields = fields_of("lora") | {"max_steps": 9}
    train(tmp_path / "whole", base, "sft", **fields)
    kept = tmp_path / "whole" / "scratch" / "kept"
    # the schedule of a longer run is another one, so its checkpoint is its own
    with pytest.raises(Killed):
        train(tmp_path / "first", base, "sft", die_at=5, **fields)
    shutil.copytree(tmp_path / "first" / "scratch" / "checkpoints" / "checkpoint-4", kept)
    with pytest.raises(Killed):
        train(tmp_path / "killed", base, "sft", die_at=8, checkpoint=kept, **fields)
    train(tmp_path / "killed", base, "sft", checkpoint=kept, **fields)
    assert contents(tmp_path / "killed" / "output") == contents(tmp_path / "whole" / "output")
    resume = json.loads((tmp_path / "killed" / "output" / "report" / "resume.json").read_text())
    assert resume == {"resumed_from": 6}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_only_begins_at_step_one_with_the_checkpoints_weights_and_a_new_optimizer(
    base: Path, tmp_path: Path, runs: Runs, method: str
) -> None:
    kept = runs("sft", method)[1]
    fields: dict[str, Any] = {"finetuning_type": method, "max_steps": 1, "per_device_train_batch_size": 6}
    lines = train(tmp_path / "run", base, "sft", checkpoint_weights=kept, **fields)
    model = AutoModelForCausalLM.from_pretrained(base if method == "lora" else kept)
    if method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, kept)
    total, count = 0.0, 0
    for row in random_rows(6, seed=6):  # one step of all rows: the loss is theirs, per trained token
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        trained = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + float(model(input_ids=ids, labels=labels).loss) * trained, count + trained
    assert [line["step"] for line in lines] == [1]
    assert lines[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert lines[0]["loss"] < train(tmp_path / "new", base, "sft", **fields)[0]["loss"] - 0.1
    state = torch.load(tmp_path / "run" / "scratch" / "checkpoints" / "checkpoint-1" / "optimizer.pt")
    assert {int(value["step"]) for value in state["state"].values()} == {1}
    assert not (tmp_path / "run" / "output" / "report" / "resume.json").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_of_hugging_faces_trainer_is_gone_on_from(base: Path, tmp_path: Path, method: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(tmp_path / "theirs"), max_steps=3, save_steps=3, per_device_train_batch_size=1, learning_rate=1e-2,
        use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=500,
    )  # fmt: skip
    rows: Any = [{name: torch.tensor(ids) for name, ids in row.items()} for row in random_rows(6)]
    Trainer(model, arguments, train_dataset=rows).train()
    kept = tmp_path / "theirs" / "checkpoint-3"
    fields: dict[str, Any] = {"finetuning_type": method, "max_steps": 5}
    fields |= {"lora_target": "q_proj,v_proj"} if method == "lora" else {}
    lines = train(tmp_path / "ours", base, "sft", checkpoint=kept, **fields)
    assert [line["step"] for line in lines] == [4, 5]  # nobody has the lines of theirs
    numbers = json.loads((tmp_path / "ours" / "output" / "train.json").read_text())
    assert (numbers["steps"], numbers["epochs"]) == (5, 5 / 3)
    checkpoints = tmp_path / "ours" / "scratch" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-5"}  # as often as we save
    state = torch.load(checkpoints / "checkpoint-5" / "optimizer.pt")
    assert {int(value["step"]) for value in state["state"].values()} == {5}
    notes = [event.get("text", "") for event in read_lines(tmp_path / "ours" / "events.jsonl")]
    assert any("cannot be checked" in note for note in notes) == (method == "lora")


def test_a_kill_behind_a_checkpoint_without_lines_goes_on_as_well(base: Path, tmp_path: Path, runs: Runs) -> None:
    kept = spoiled(runs("sft", "lora")[1], tmp_path / "kept")
    for name in ("metrics.jsonl", "whole.json"):
        (kept / name).unlink()
    fields = fields_of("lora") | {"max_steps": 9}
    with pytest.raises(Killed):
        train(tmp_path / "run", base, "sft", die_at=8, checkpoint=kept, **fields)
    assert [line["step"] for line in train(tmp_path / "run", base, "sft", checkpoint=kept, **fields)] == [5, 6, 7, 8, 9]


def test_a_model_saved_under_published_names_is_resumed_with_all_of_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=VOCABULARY, initializer_range=0.2, pad_token_id=256, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer(tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in load_file(tmp_path / "base" / "model.safetensors")
    fields: dict[str, Any] = {"finetuning_type": "full", "max_steps": 5}
    whole = train(tmp_path / "whole", tmp_path / "base", "sft", **fields)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tmp_path / "base", "sft", die_at=4, **fields)
    assert timeless(train(tmp_path / "killed", tmp_path / "base", "sft", **fields)) == timeless(whole)
    assert contents(tmp_path / "killed" / "output") == contents(tmp_path / "whole" / "output")


def test_what_does_not_fit_the_run_is_refused_with_both_values(base: Path, tmp_path: Path, runs: Runs) -> None:
    kept, full = runs("sft", "lora")[1], runs("sft", "full")[1]
    wide = tiny_model(tmp_path / "wide", hidden_size=64)

    def why(name: str, where: Path = base, method: str = "lora", folder: Path = kept, **fields: Any) -> str:
        return refusal(where, tmp_path / name, method=method, checkpoint=folder, **fields)

    assert f"{kept} has 4 steps behind it, and this run has 4: nothing is left to do" in why("a", max_steps=4)
    assert "lora_rank is 4, the checkpoint has 8; lora_alpha is 8" in why("b", lora_rank=4)
    text = why("c", lora_target=["q_proj"])
    assert "24 that the model has not: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight," in text
    assert "is damaged, or of another model or adapter; of its tensors 22 of another shape: " in why("d", wide)
    assert "lm_head.weight" not in (text := why("e", wide, "full", full))
    assert "model.embed_tokens.weight is (264, 32), not (264, 64)" in text
    assert "learning_rate is 0.02, the checkpoint's is 0.01" in why("f", learning_rate=0.02)
    text = f"the optimizer in {kept} is another than optim sgd: its state has no dampening, momentum, nesterov."
    assert text in why("i", optim="sgd")
    assert "weight_decay is 0.5, the checkpoint's is 0" in why("g", weight_decay=0.5)
    assert refusal(base, tmp_path / "h", checkpoint_weights=kept, lora_rank=4).startswith(f"{kept}: lora_rank is 4,")


def test_states_that_are_not_plain_numbers_are_never_read(base: Path, tmp_path: Path, runs: Runs) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = spoiled(runs("sft", "lora")[1], tmp_path / f"kept-{name}")
        torch.save({"state": Harm()}, kept / name)
        text = refusal(base, tmp_path / name, checkpoint=kept)
        assert f"{kept / name} cannot be read as plain tensors and numbers (UnpicklingError: " in text
        assert "or set resume: weights_only" in text
    assert not (tmp_path / "harm").exists()


def test_an_adapters_checkpoint_is_resumed_on_its_own_base_only(base: Path, tmp_path: Path, runs: Runs) -> None:
    kept = spoiled(runs("sft", "lora")[1], tmp_path / "kept")
    (kept / "base.json").write_text('{"base_digest": "base-9"}')
    for name in ("checkpoint", "checkpoint_weights"):
        text = refusal(base, tmp_path / name, **{name: kept})
        assert "trained on base weights base-9, this base has base-0" in text
