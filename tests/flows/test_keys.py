"""Every settings field: whose key it changes, and that no field is left without an answer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.graph import build
from registry.deepspeed import FOLDER as DEEPSPEED
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from registry.online_records import GroupSettings, OnlineSettings, PpoSettings
from registry.records import DataSettings, ModelSettings, RuntimeSettings, TrainSettings
from tasks.devices import cuda_devices
from tasks.steps import LocalFolder, Step
from tests.flows.keyed import changed, identities, placed, write_checkpoint, write_folder

NOTHING: set[str] = set()
READ, LEFT_OUT = {"fetch"}, {"fetch", "render"}
TRAINED = {"train"}
ON_MODEL = {"render", "tokenize", "train", "merge", "evaluate"}  # whose model is made here, and no local folder

# Field → a changed value (FOLDER is where the recipe lies), and the kinds of steps whose own identity, or direct local
# input, it changes. What hangs on those steps follows by the digests of what they make.
FIELDS: dict[type, dict[str, tuple[Any, set[str]]]] = {
    ModelSettings: {
        "model_name_or_path": ("FOLDER/other_model", {"train", "merge", "evaluate"}),
        "model_revision": ("v2", NOTHING),  # of a local folder there is one; see the test of hub models below
        "adapter_name_or_path": ("FOLDER/adapter", TRAINED),
        **dict.fromkeys(("add_tokens", "add_special_tokens"), (["<a>"], {"add_tokens", *ON_MODEL})),
        "resume_from_checkpoint": ("FOLDER/checkpoint", TRAINED),
        "resume": ("weights_only", TRAINED),
    },
    DataSettings: {
        "dataset": ("FOLDER/more.jsonl", READ),
        "eval_dataset": ("FOLDER/more.jsonl", {"fetch", "render", "tokenize", "evaluate"}),  # a set more
        "val_size": (0.25, {"fetch", "render", "tokenize", "evaluate"}),  # another part; a set more
        "max_samples": (3, READ),
        "template": ("chatml", {"render", "train", "evaluate"}),
        "cutoff_len": (99, {"tokenize"}),
        "overlong": ("truncate", {"tokenize"}),
        "packing": (True, {"tokenize", "train"}),
        "mask_history": (True, {"render"}),
        "train_on_prompt": (True, {"render"}),
        "control_tokens": ("keep", {"render"}),
        "default_system": ("Be brief.", {"render", "evaluate"}),
        "enable_thinking": (False, {"render", "evaluate"}),
        "cut_answers": (True, {"tokenize"}),
        "mix_strategy": ("interleave_over", {"tokenize"}),
        "interleave_probs": ([0.9, 0.1], {"tokenize"}),
        "bad_rows": ("skip", LEFT_OUT),
        "bad_rows_limit": (0.25, LEFT_OUT),
    },
    TrainSettings: {
        "stage": ("orpo", {"fetch", "render", "train"}),
        "pref_loss": ("ipo", TRAINED),
        "pref_beta": (0.2, TRAINED),
        "pref_ftx": (0.5, TRAINED),
        "dpo_label_smoothing": (0.1, TRAINED),
        "simpo_gamma": (0.7, TRAINED),
        **dict.fromkeys(("kto_chosen_weight", "kto_rejected_weight"), (2.0, TRAINED)),
        "center_rewards_coefficient": (0.01, TRAINED),
        "ref_model": ("FOLDER/other_model", TRAINED),
        **dict.fromkeys(("max_new_tokens", "top_k", "rollout_batch_size"), (5, TRAINED)),
        "reward_model": ("FOLDER/other_model", TRAINED),
        "reward_funcs": (["stopped"], TRAINED),
        "reward_weights": ([-1.0], TRAINED),
        **dict.fromkeys(("missing_eos_penalty", "score_clip"), (5.0, TRAINED)),
        **dict.fromkeys(("ppo_score_norm", "ppo_whiten_rewards"), (True, TRAINED)),
        **dict.fromkeys(("cliprange", "cliprange_value", "kl_coef", "target_kl"), (0.1, TRAINED)),
        **dict.fromkeys(("gamma", "lam", "temperature", "top_p"), (0.9, TRAINED)),
        "ppo_buffer_size": (2, TRAINED),
        "ppo_epochs": (3, TRAINED),
        "ppo_target": (6.0, TRAINED),
        "num_generations": (2, TRAINED),
        "scale_rewards": ("none", TRAINED),
        "loss_type": ("grpo", TRAINED),
        "critic_learning_rate": (1e-3, TRAINED),
        "finetuning_type": ("full", {"train", "merge"}),
        "lora_rank": (5, TRAINED),
        "lora_alpha": (7, TRAINED),
        "lora_dropout": (0.5, TRAINED),
        "lora_target": (["q_proj"], TRAINED),
        "additional_target": (["embed_tokens"], TRAINED),
        **dict.fromkeys(("use_rslora", "use_dora", "pissa_init", "use_qlora"), (True, TRAINED)),
        "loraplus_lr_ratio": (16.0, TRAINED),
        "create_new_adapter": (True, ON_MODEL),
        "quant_bit": (8, TRAINED),
        "quant_type": ("fp4", TRAINED),
        "double_quantization": (False, TRAINED),
        "freeze_trainable_layers": (1, TRAINED),
        "freeze_trainable_modules": (["mlp"], TRAINED),
        "freeze_extra_modules": (["norm"], TRAINED),
        "neftune_noise_alpha": (5.0, TRAINED),
        "optim": ("sgd", TRAINED),
        "rope_scaling": ("yarn", TRAINED),
        "flash_attn": ("eager", TRAINED),
        "enable_liger_kernel": (True, TRAINED),
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), (2, TRAINED)),
        "nproc_per_node": (2, TRAINED),
        "nnodes": (2, TRAINED),
        "deepspeed": ("zero2", TRAINED),
        "fsdp": (True, TRAINED),
        "learning_rate": (1e-3, TRAINED),
        "num_train_epochs": (1.0, TRAINED),
        "max_steps": (9, TRAINED),
        "lr_scheduler_type": ("cosine", TRAINED),
        "warmup_ratio": (0.5, TRAINED),
        "warmup_steps": (2, TRAINED),
        "weight_decay": (0.1, TRAINED),
        "max_grad_norm": (0.5, TRAINED),
        "seed": (1, TRAINED),  # and fetch, where rows are kept back
        "bf16": (True, {"train", "evaluate"}),
        "eval_steps": (3, TRAINED),
        "early_stopping_steps": (2, TRAINED),
        "load_best_model_at_end": (True, TRAINED),
        "metric_for_best_model": ("eval_rewards/margins", TRAINED),
    },
    RuntimeSettings: {
        "dataset_dir": ("FOLDER", NOTHING),
        "logging_steps": (7, NOTHING),
        "save_steps": (7, NOTHING),
        "save_total_limit": (7, NOTHING),
        "launcher": ("slurm", NOTHING),
        "slurm": ({"partition": "gpu"}, NOTHING),
        "kubernetes": ({"image": "one", "claim": "home", "mount_path": "/home"}, NOTHING),
        "force_torchrun": (True, NOTHING),
        "preprocessing_num_workers": (7, NOTHING),
        "preprocessing_dask": ("tcp://127.0.0.1:8786", NOTHING),
        "per_device_eval_batch_size": (7, NOTHING),
        "gradient_checkpointing": (True, NOTHING),
        "sample_steps": (7, NOTHING),
        "report_to": ("tensorboard", NOTHING),
        "wandb_project": ("other", NOTHING),
        "wandb_run_name": ("other", NOTHING),
    },
}
FREEZING = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
TWO_SETS = ["FOLDER/train.jsonl", "FOLDER/more.jsonl"]
BESIDE: dict[str, dict[str, Any]] = {
    **{key: {"stage": "dpo"} for key in ("pref_loss", "pref_beta", "pref_ftx", "dpo_label_smoothing", "ref_model")},
    **{key: {"eval_steps": 3} for key in ("early_stopping_steps", "load_best_model_at_end")},
    "metric_for_best_model": {"stage": "dpo", "eval_steps": 3, "val_size": 0.25},
    "simpo_gamma": {"stage": "dpo", "pref_loss": "simpo"},
    **{
        key: {"stage": "ppo", "reward_funcs": ["length"]}
        for key in (*OnlineSettings.model_fields, *PpoSettings.model_fields)
        if key not in ("reward_model", "reward_funcs")
    },
    **{
        key: {"stage": "grpo", "reward_funcs": ["length"], "per_device_train_batch_size": 4}
        for key in GroupSettings.model_fields
    },
    "reward_funcs": {"stage": "ppo", "reward_model": "FOLDER/model"},
    "reward_model": {"stage": "ppo", "reward_funcs": ["length"]},
    **{key: {"stage": "kto"} for key in ("kto_chosen_weight", "kto_rejected_weight")},
    "center_rewards_coefficient": {"stage": "rm"},
    "resume": {"resume_from_checkpoint": "FOLDER/checkpoint"},
    "create_new_adapter": {"adapter_name_or_path": "FOLDER/adapter"},
    **{key: {"quant_bit": 4} for key in ("quant_type", "double_quantization")},
    **{key: {"finetuning_type": "freeze"} for key in FREEZING},
    "cut_answers": {"overlong": "truncate"},
    "launcher": {"nproc_per_node": 1},
    **{key: {"launcher": "slurm", "nproc_per_node": 1} for key in ("nnodes", "slurm")},
    "mix_strategy": {"dataset": TWO_SETS},
    "interleave_probs": {"dataset": TWO_SETS, "mix_strategy": "interleave_under"},
}
"""What a field needs beside it to mean something; the same before and after the change."""
CASES = [(record, name, *case) for record, table in FIELDS.items() for name, case in table.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("keys"))


def test_the_table_has_every_field() -> None:
    assert {record: set(table) for record, table in FIELDS.items()} == {
        record: set(record.model_fields) - {"model"}
        for record in FIELDS  # which needs a second stage; see below
    }
    assert len(CASES) == 119


@pytest.mark.parametrize(("record", "name", "value", "kinds"), [pytest.param(*case, id=case[1]) for case in CASES])
def test_a_field_changes_these_keys_and_no_others(
    folder: Path, record: type, name: str, value: Any, kinds: set[str]
) -> None:
    needed = BESIDE.get(name, {})
    beside = {key: placed(given, folder) for key, given in needed.items()}
    setting = beside | {name: placed(value, folder)}
    after = identities(folder, setting)
    assert changed(identities(folder, beside), after) == kinds


def test_the_number_of_processes_is_that_of_the_visible_devices_unless_it_is_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def processes(**stage: Any) -> int:
        cuda_devices.cache_clear()
        found: int = identities(folder, stage)["sft/train"][1]["train"]["nproc_per_node"]
        return found

    lines = "".join(f"GPU-{number}, NVIDIA L4, 8.9, 23034\n" for number in range(4))
    tool = tmp_path / "nvidia-smi"  # stands for the driver's tool, not for code of ours
    tool.write_text(f"#!/bin/sh\nprintf '{lines}'")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert processes() == 1
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert processes() == 4
    assert processes(nproc_per_node=2) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0")
    assert processes() == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes() == 1
    cuda_devices.cache_clear()


def test_several_machines_count_and_their_place_to_meet_does_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = identities(folder)
    for name, value in {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    together = identities(folder)
    assert changed(alone, together) == TRAINED
    assert together["sft/train"][1]["train"]["nnodes"] == 2
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.2")
    assert changed(together, identities(folder)) == NOTHING


def test_a_deepspeed_file_counts_by_its_content(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    shutil.copyfile(DEEPSPEED / "zero2.json", mine)
    by_name, by_path = (identities(folder, {"deepspeed": wanted}) for wanted in ("zero2", str(mine)))
    assert changed(by_name, by_path) == NOTHING
    mine.write_text('{"zero_optimization": {"stage": 1}}')
    assert changed(by_path, identities(folder, {"deepspeed": str(mine)})) == TRAINED


def test_a_checkpoint_counts_by_its_content(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "copy")
    given, copied = ({"resume_from_checkpoint": str(place)} for place in (folder / "checkpoint", tmp_path / "copy"))
    before, weights = identities(folder, given), identities(folder, given | {"resume": "weights_only"})
    assert before["sft/train"][3] == ["base", "checkpoint", "shards"]
    assert weights["sft/train"][3] == ["base", "checkpoint_weights", "shards"]
    assert changed(before, identities(folder, copied)) == NOTHING
    (tmp_path / "copy" / "README.md").write_text("another")
    assert changed(before, identities(folder, copied)) == NOTHING
    (tmp_path / "copy" / "optimizer.pt").write_text("another")
    assert changed(before, identities(folder, copied)) == TRAINED
    assert changed(weights, identities(folder, copied | {"resume": "weights_only"})) == NOTHING
    (tmp_path / "copy" / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"stages\.sft\.resume_from_checkpoint: .* lacks optimizer\.pt"):
        identities(folder, copied)


def test_a_hub_model_counts_by_name_and_revision(folder: Path) -> None:
    hub = {"model_name_or_path": "owner/model"}
    assert changed(identities(folder, hub), identities(folder, hub | {"model_revision": "v2"})) == {"model"}
    demo = {"model_name_or_path": "smollm2-135m-instruct"}
    same = {"model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert changed(identities(folder, demo), identities(folder, same)) == NOTHING


def test_a_stage_that_starts_from_another_has_that_stages_model_as_its_base(folder: Path) -> None:
    stages = {
        "sft": {"stage": "sft", "dataset": str(folder / "train.jsonl")},
        "dpo": {"stage": "dpo", "dataset": str(folder / "more.jsonl")},
    }
    raw = {"name": "keys", "model_name_or_path": str(folder / "model"), "stages": stages}
    alone = build(load_recipe(raw), Home.open())
    stages["dpo"]["model"] = "sft"
    chain = build(load_recipe(raw), Home.open())
    before, after = (pipeline.stages["dpo"].trained.inputs["base"].source for pipeline in (alone, chain))
    assert isinstance(before, LocalFolder)
    assert after is chain.stages["sft"].model
    assert list(chain.stages) == ["sft", "dpo"]


def test_a_new_adapter_is_trained_on_what_merging_the_given_one_makes(folder: Path) -> None:
    stage = {"stage": "sft", "dataset": str(folder / "train.jsonl"), "create_new_adapter": True}
    given = {"model_name_or_path": str(folder / "model"), "adapter_name_or_path": str(folder / "adapter")}
    built = build(load_recipe({"name": "keys", **given, **stage}), Home.open()).stages["sft"]
    merged = built.trained.inputs["base"].source
    assert isinstance(merged, Step)
    assert merged.title == "sft/merge:adapter"
    assert merged.inputs["adapter"].source == LocalFolder(folder / "adapter")
    assert "adapter" not in built.trained.inputs
    assert built.model.inputs["base"].source is merged


def test_the_seed_counts_for_the_rows_kept_back(folder: Path) -> None:
    kept = {"val_size": 2}
    assert changed(identities(folder, kept), identities(folder, kept | {"seed": 1})) == {"fetch", "train"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"lora_alpha": 16}),
        ({"lora_rank": 4}, {"lora_rank": 4, "lora_alpha": 8}),
        ({"max_steps": 5}, {"max_steps": 5, "num_train_epochs": 1.0}),
        ({}, {"max_steps": -1}),
        ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}),
        ({"lora_target": "q_proj, k_proj"}, {"lora_target": ["q_proj", "k_proj"]}),
        ({"num_train_epochs": 2}, {"num_train_epochs": 2.0}),
        ({"val_size": 0}, {"val_size": 0.0}),
        ({"cutoff_len": 64}, {"model_max_length": 64}),
        ({"use_qlora": True}, {"quant_bit": 4}),
        ({"quant_bit": 4}, {"quantization_bit": 4, "quantization_type": "nf4", "double_quant": True}),
        ({"quant_bit": 8}, {"quant_bit": 8, "use_qlora": True}),
    ],
)
def test_settings_that_mean_the_same_have_the_same_keys(
    folder: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert changed(identities(folder, one), identities(folder, other)) == NOTHING


def test_lora_settings_are_not_in_the_key_of_full_tuning(folder: Path) -> None:
    identity = identities(folder, {"finetuning_type": "full"})["sft/train"][1]
    assert [name for name in identity["train"] if name.startswith("lora")] == []


def test_how_far_positions_are_stretched_counts_only_where_they_are(folder: Path) -> None:
    stretched = {"rope_scaling": "linear"}
    assert changed(identities(folder, stretched), identities(folder, stretched | {"cutoff_len": 99})) == {
        "tokenize",
        "train",
    }


def test_files_of_other_names_with_the_same_bytes_change_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    assert changed(identities(folder), identities(folder, {"dataset": str(tmp_path / "copy.jsonl")})) == NOTHING


def test_more_rows_than_max_samples_take_the_whole_file_and_are_still_another_key(folder: Path) -> None:
    # what comes out is the same bytes: the steps behind stay hits by their inputs' digests
    assert changed(identities(folder), identities(folder, {"max_samples": 8})) == READ
