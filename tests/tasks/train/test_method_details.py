"""Resume, positions, kernels and refusals of the tuning methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from registry.lora_targets import DEFAULT_TARGETS
from tasks.program import ProgramError
from tasks.train.lora import resolve_targets
from tests.tasks.train.test_methods import logits, losses, make_spec, merge, report, train
from tests.tasks.train.test_training import contents, run
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("details") / "base", hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize(
    "fields",
    [
        {"pissa_init": True},
        {"use_dora": True},
        {"loraplus_lr_ratio": 8.0},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"quant_bit": 4},
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"optim": "adagrad"},
        {"optim": "rmsprop"},
        {"neftune_noise_alpha": 5.0, "additional_target": ["embed_tokens"]},
    ],
    ids=lambda fields: "-".join(fields) + f"-{fields.get('optim', '')}",
)
def test_a_resumed_run_has_the_bytes_of_one_never_killed(
    base: Path,
    tmp_path: Path,
    fields: dict[str, Any],
) -> None:
    fields = fields | {"max_steps": 5, "learning_rate": 1e-3}
    whole = train(tmp_path / "whole", base, **fields)
    spec = make_spec(tmp_path / "killed", base, save_steps=2, **fields)
    run(spec, die_at=4)
    resumed = run(spec)
    assert json.loads((resumed / "report" / "resume.json").read_text()) == {"resumed_from": 2}
    assert contents(resumed) == contents(whole)
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    "fields",
    [
        {"finetuning_type": "full"},
        {"lora_dropout": 0.2},
        {"bf16": True},
        {"quant_bit": 4},
        {"additional_target": "norm"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_activations_computed_twice_change_no_bit(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    kept = train(tmp_path / "kept", base, **fields)
    again = train(tmp_path / "again", base, gradient_checkpointing=True, **fields)
    assert contents(kept) == contents(again)
    assert losses(kept) == losses(again)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        (
            "yarn",
            {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
        ),
        # (2 x 24 / 16 - 1) ^ (8 / 6) = 2.519842 times the base
        ("dynamic", {"rope_type": "default", "rope_theta": 25198.42}),
    ],
)
def test_stretched_positions_are_those_of_the_merged_model(tmp_path: Path, kind: str, expected: dict[str, Any]) -> None:
    folder = tiny_model(tmp_path / "base", max_position_embeddings=16)
    output = train(tmp_path / "run", folder, rope_scaling=kind, cutoff_len=24)
    model = merge(tmp_path / "merged", folder, output)
    config = AutoConfig.from_pretrained(model)
    for name, value in expected.items():
        assert config.rope_parameters[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
    assert config.max_position_embeddings == (24 if kind == "dynamic" else 32)
    plain = AutoModelForCausalLM.from_pretrained(model, config=AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids=torch.arange(12)[None]).logits, logits(model), atol=1e-4)


def test_rows_that_fit_stretch_nothing_and_an_adapter_is_continued_with_its_own_positions(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "base", max_position_embeddings=16)
    plain, fitting = train(tmp_path / "a", folder), train(tmp_path / "b", folder, rope_scaling="linear", cutoff_len=16)
    assert losses(plain) == losses(fitting)
    with pytest.raises(ProgramError, match="trained with positions as they are, these settings make them"):
        train(tmp_path / "c", folder, rope_scaling="linear", cutoff_len=24, adapter=plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"additional_target": "embed"}, r"additional_target embed matches no module.*embed_tokens"),
        ({"pissa_init": True, "lora_rank": 40}, r"lora_rank 40 is more than the 32 singular values of .*k_proj"),
        ({"additional_target": "q_proj", "quant_bit": 4}, "its weights are quantised"),
        ({"lora_target": "q_proj", "additional_target": "q_proj"}, "in lora_target and in additional_target"),
        ({"flash_attn": "fa2", "bf16": True}, "flash_attn fa2 needs a CUDA device"),
        ({"enable_liger_kernel": True}, "enable_liger_kernel: the kernels are written for CUDA"),
        ({"optim": "paged_adamw_8bit"}, "made for CUDA devices"),
        ({"optim": "galore_adamw", "finetuning_type": "full"}, "needs the package galore_torch"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA lacks")
def test_what_cannot_be_done_is_refused_with_the_reason(
    base: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ProgramError, match=message) as error:
        train(tmp_path / "run", base, **fields)
    assert error.value.kind == "bad_setting"


def test_a_quantised_base_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "gptq")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ProgramError, match=r"weights are quantised \(gptq\).*cannot be merged.*Use the model as it was"
    ):
        train(tmp_path / "run", tmp_path / "gptq")


def test_the_usual_modules_of_the_family_are_wrapped(base: Path, tmp_path: Path) -> None:
    output = train(tmp_path / "run", base, lora_target="default")
    assert report(output)["wrapped_modules"] == sorted(DEFAULT_TARGETS["llama"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.model_type = "unheard_of"
    with pytest.raises(ProgramError, match="nothing is known of the model family unheard_of"):
        resolve_targets(model, ["default"])


def test_attention_kernels_agree(base: Path, tmp_path: Path) -> None:
    outputs = [train(tmp_path / name, base, flash_attn=name) for name in ("auto", "eager", "sdpa")]
    for output in outputs[1:]:
        assert losses(output) == pytest.approx(losses(outputs[0]), rel=1e-5)


def test_what_was_asked_for_wrapped_and_saved_is_printed(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(tmp_path / "run", base, lora_target="q_proj,v_proj", additional_target="norm")
    line = (
        "lora_target q_proj, v_proj, additional_target norm: 4 modules wrapped (q_proj, v_proj); trained whole: norm;"
    )
    assert f"{line} 9 tensors saved, all of theirs" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "adagrad", "rmsprop"])
def test_an_optimizer_is_chosen_by_name(base: Path, tmp_path: Path, name: str) -> None:
    chosen = losses(train(tmp_path / "run", base, optim=name, max_steps=4, learning_rate=1e-3))
    assert chosen[3] < chosen[0]


def test_with_loraplus_the_b_matrices_learn_by_the_ratio_faster(base: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"optim": "sgd", "max_steps": 1, "weight_decay": 0.0}
    plain = load_file(train(tmp_path / "plain", base, **fields) / "adapter_model.safetensors")
    faster = load_file(train(tmp_path / "faster", base, loraplus_lr_ratio=16.0, **fields) / "adapter_model.safetensors")
    for name, value in plain.items():
        ratio = 16.0 if ".lora_B." in name else 1.0  # B begins as 0: after one step it is its own update
        assert torch.allclose(faster[name], ratio * value, rtol=1e-5)
