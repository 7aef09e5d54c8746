"""DeepSpeed configs: the ready ones, and what is refused in a person's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.deepspeed import READY, deepspeed_config, zero_stage
from registry.errors import InputError
from registry.loading import load_recipe


def test_every_ready_config_is_one_that_deepspeed_takes() -> None:
    deepspeed = pytest.importorskip("deepspeed.runtime.zero.config", reason="DeepSpeed is not installed")
    stages = {}
    for name in READY:
        config = deepspeed_config(name)
        settings = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
        stages[name] = int(deepspeed.DeepSpeedZeroConfig(**settings).stage)
        assert stages[name] == zero_stage(config)
        assert ("offload_optimizer" in settings) == name.endswith("_offload")
    assert stages == {"zero0": 0, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer: the recipe says it, with learning_rate and weight_decay"),
        ({"train_batch_size": 8}, "train_batch_size: 8 may say another thing than the recipe"),
        ({"fp16": {"enabled": True}}, "fp16: there is no fp16 training"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: the recipe says it, with bf16"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: 4 is no stage"),
        ([1], "not a DeepSpeed config"),
    ],
)
def test_a_config_that_contradicts_the_recipe_is_refused(tmp_path: Path, config: Any, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        deepspeed_config(str(path))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"deepspeed": "zero4"}, "deepspeed: 'zero4' is neither a ready config nor a .json file"),
        ({"deepspeed": "nowhere.json"}, "nowhere.json"),
        ({"deepspeed": "zero2", "fsdp": "full_shard"}, "fsdp: fsdp and deepspeed both divide the memory"),
    ],
)
def test_a_recipe_is_refused_before_anything_starts(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    raw = {"name": "x", "model_name_or_path": "smollm2-135m-instruct", "dataset": str(tmp_path / "rows.jsonl")}
    with pytest.raises(InputError) as error:
        load_recipe(raw | settings)
    assert said in str(error.value)


@pytest.mark.parametrize("written", [True, "full_shard", "full_shard auto_wrap"])
def test_fsdp_is_written_in_several_ways(tmp_path: Path, written: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    raw = {"name": "x", "model_name_or_path": "smollm2-135m-instruct", "dataset": str(tmp_path / "rows.jsonl")}
    assert load_recipe(raw | {"fsdp": written}).stages[0].train.identity()["fsdp"] is True
