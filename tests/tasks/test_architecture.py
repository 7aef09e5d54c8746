"""Shapes of weights from headers and from config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.architecture import Architecture, describe, read_architecture, shapes_like_llama, wrapped
from tests.tiny import tiny_model

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
QWEN25_05B = SMOLLM2_135M | {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


# 49152 x 576 + 30 x (2 x 576 x 576 + 2 x 192 x 576 + 3 x 576 x 1536 + 2 x 576) + 576; Qwen2.5-0.5B as published
@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SMOLLM2_135M, 134_515_008),
        (SMOLLM2_135M | {"tie_word_embeddings": False}, 134_515_008 + 49152 * 576),
        (QWEN25_05B, 494_032_768),
    ],
)
def test_parameters_are_counted_from_the_config(config: dict[str, Any], parameters: int) -> None:
    assert describe(config, shapes_like_llama(config)).parameters() == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_headers_and_config_of_a_saved_model_give_the_same_shapes(tmp_path: Path, tied: bool) -> None:
    folder = tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    from_headers = read_architecture(folder)
    (folder / "model.safetensors").unlink()
    from_config = read_architecture(folder)
    assert from_headers is not None
    assert from_config is not None
    assert dict(sorted(from_headers.tensors.items())) == dict(sorted(from_config.tensors.items()))
    # 264 x 32 + 2 x (2 x 32 x 32 + 2 x 16 x 32 + 3 x 32 x 64 + 2 x 32) + 32, and the head
    assert from_headers.parameters() == 27040 + (0 if tied else 264 * 32)


def test_lora_wraps_the_linear_modules_that_are_named(tmp_path: Path) -> None:
    model = describe(SMOLLM2_135M, shapes_like_llama(SMOLLM2_135M))
    assert len(wrapped(model, ["all"])) == len(wrapped(model, ["default"])) == 7 * 30
    assert len(wrapped(model, ["q_proj", "mlp.down_proj"])) == 2 * 30
    assert wrapped(model, ["k_proj"])["model.layers.29.self_attn.k_proj"] == (192, 576)


def test_a_reward_model_has_a_head_for_one_score() -> None:
    config = SMOLLM2_135M | {"tie_word_embeddings": False}
    model: Architecture = describe(config, shapes_like_llama(config)).for_scores()
    assert model.parameters() == 134_515_008 + 576


def test_a_kind_of_model_that_says_too_little_has_no_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 8, "vocab_size": 16}))
    assert read_architecture(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M | {"model_type": "unheard_of"}))
    assert read_architecture(tmp_path) is None
