"""A recipe is read whole or refused whole, and every error says value, rule and cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from registry.evaluation_records import EvaluationSettings
from registry.loading import load_recipe, override
from registry.optimizers import OPTIMIZERS
from registry.recipe import Recipe
from registry.recipes import RECIPES
from registry.records import TrainSettings
from registry.stage_settings import FIELDS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "hi", "output": "ok"}) + "\n")
    return path


def recipe(data: Path, **stage: Any) -> dict[str, Any]:
    return {
        "name": "toy",
        "model_name_or_path": "smollm2-135m-instruct",
        "stages": {"sft": {"stage": "sft", "dataset": str(data), **stage}},
    }


def problems(raw: Any, overrides: list[str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(raw, overrides or [])
    return str(caught.value)


def test_every_shipped_recipe_is_valid() -> None:
    found = [load_recipe(name) for name in RECIPES]
    assert [r.name for r in found] == ["demo", "orpo", "pt_sft_dpo", "sft_dpo", "sft_kto", "sft_rm_grpo", "sft_rm_ppo"]


def test_all_errors_of_a_recipe_come_at_once_each_with_its_place(data: Path) -> None:
    raw = recipe(data, lerning_rate=1, max_steps=0, lora_rank="x", template="chatmll", finetuning_type="lorra")
    raw["stages"]["sft"]["dataset"] = "assistnt"
    text = problems(raw)
    assert "6 problems" in text
    assert "stages.sft.lerning_rate: unknown key. Did you mean learning_rate or critic_learning_rate?" in text
    assert "stages.sft.max_steps: 0 should be greater than or equal to 1" in text
    assert "stages.sft.lora_rank: 'x' should be a valid integer" in text
    assert (
        "stages.sft.dataset: 'assistnt' is not a known data set and no such file exists. Did you mean assistant" in text
    )
    assert "stages.sft.template: 'chatmll' is not a known template. Did you mean chatml?" in text
    assert "stages.sft.finetuning_type: 'lorra' is not a known finetuning_type. Did you mean lora?" in text


def test_what_is_of_the_whole_recipe_is_read_above_its_stages_only(data: Path) -> None:
    raw = recipe(data) | {"timeout_minutes": 90}
    assert load_recipe(raw).run.timeout_minutes == 90
    for wrong in (0, -1, "long"):
        assert "timeout_minutes: " in problems(raw | {"timeout_minutes": wrong})
    text = problems(recipe(data, timeout_minutes=90, name="x"))
    assert "stages.sft.timeout_minutes: is of the recipe, not of a stage. Write timeout_minutes above" in text
    assert "stages.sft.name: is of the recipe, not of a stage" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 1.5), ("bf16", "yes"), ("learning_rate", "fast"), ("lora_rank", True), ("packing", 1), ("dataset", 3)],
)
def test_a_wrong_type_is_refused_and_not_converted(data: Path, field: str, value: Any) -> None:
    assert f"stages.sft.{field}" in problems(recipe(data, **{field: value}))


def test_top_level_settings_are_the_defaults_of_stages(data: Path) -> None:
    raw = recipe(data) | {"learning_rate": 3e-4, "seed": 1}
    raw["stages"]["sft"]["seed"] = 2
    train = load_recipe(raw).stages[0].train
    assert (train.learning_rate, train.seed) == (3e-4, 2)


def test_a_flat_config_of_one_stage_is_a_recipe(data: Path) -> None:
    flat = {"stage": "sft", "model_name_or_path": "smollm2-135m-instruct", "dataset": str(data), "lora_rank": 4}
    stage = load_recipe(flat).stages[0]
    assert (stage.name, stage.train.lora_rank) == ("sft", 4)


def test_yaml_and_json_mean_the_same(tmp_path: Path, data: Path) -> None:
    raw = recipe(data, learning_rate=2e-4)
    (tmp_path / "r.json").write_text(json.dumps(raw))
    (tmp_path / "r.yaml").write_text(
        "name: toy\nmodel_name_or_path: smollm2-135m-instruct\n"
        f"stages:\n  sft: {{stage: sft, dataset: {data}, learning_rate: 2e-4}}\n"
    )
    first, second = (load_recipe(str(tmp_path / name)) for name in ("r.json", "r.yaml"))
    assert first.stages == second.stages


def test_overrides_are_typed_as_in_the_file(data: Path) -> None:
    stage = load_recipe(
        recipe(data), ["stages.sft.learning_rate=1e-3", "stages.sft.lora_target=[q_proj]", "seed=7"]
    ).stages[0]
    assert (stage.train.learning_rate, stage.train.lora_target, stage.train.seed) == (1e-3, ("q_proj",), 7)
    assert override({"a": {"b": 1}}, ["a.b=x"]) == {"a": {"b": "x"}}


def test_an_override_that_leads_nowhere_is_refused(data: Path) -> None:
    assert "no stage 'sff'. Did you mean sft?" in problems(recipe(data), ["stages.sff.seed=1"])
    assert "key=value" in problems(recipe(data), ["seed"])
    assert "unknown key. Did you mean learning_rate or critic_learning_rate?" in problems(
        recipe(data), ["stages.sft.learning_rat=1"]
    )


def test_a_key_written_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nseed: 1\nseed: 2\n")
    assert f"{path}:3: not valid YAML or JSON: key 'seed' is written twice, first in line 2" in problems(str(path))


def test_files_are_found_beside_the_recipe(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "r.yaml").write_text("model_name_or_path: smollm2-135m-instruct\nstage: sft\ndataset: rows.jsonl\n")
    found = load_recipe(str(tmp_path / "r.yaml"))
    assert found.stages[0].sources[0].files == (data,)
    assert load_recipe(found.raw).stages == found.stages


def test_a_users_dataset_info_is_read_as_it_is(tmp_path: Path, data: Path) -> None:
    info = {"mine": {"file_name": "rows.jsonl", "columns": {"prompt": "instruction", "response": "output"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    raw = recipe(data) | {"dataset_dir": str(tmp_path)}
    raw["stages"]["sft"]["dataset"] = "mine"
    assert load_recipe(raw).stages[0].sources[0].files == (data,)
    raw["stages"]["sft"]["dataset"] = "mien"
    assert "Did you mean mine?" in problems(raw)


def test_lora_settings_with_full_tuning_are_refused(data: Path) -> None:
    assert "lora_rank has no effect with finetuning_type full" in problems(
        recipe(data, finetuning_type="full", lora_rank=4)
    )


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"finetuning_type": "full", "quant_bit": 4},
            "quantised weights cannot be moved, only matrices beside them can",
        ),
        (
            {"finetuning_type": "freeze", "use_qlora": True},
            "Use finetuning_type: lora, or remove quant_bit and use_qlora",
        ),
        ({"pissa_init": True, "quant_bit": 8}, "takes singular values out of the base"),
        ({"pissa_init": True, "use_dora": True}, "Remove one of pissa_init and use_dora"),
        (
            {"pissa_init": True, "adapter_name_or_path": "a"},
            "an adapter that is trained on has its first values already",
        ),
        ({"resume": "weights_only"}, "resume has no effect"),
        ({"resume_from_checkpoint": "c", "deepspeed": "zero2"}, "DeepSpeed reads its optimizer state with pickle"),
        ({"resume_from_checkpoint": "c", "pissa_init": True}, "to what its own pissa_init left of the base"),
        (
            {"resume_from_checkpoint": "c", "eval_steps": 1, "load_best_model_at_end": True},
            "those of an earlier step, which the checkpoint does not hold",
        ),
        ({"create_new_adapter": True}, "there is no adapter to merge first"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "leave nothing to train"),
        (
            {"quant_bit": 8, "quant_type": "fp4"},
            "quant_type has no effect with quant_bit 8. Remove it, or use quant_bit: 4",
        ),
        ({"quant_bit": 3}, "stages.sft.quant_bit: 3 should be 4 or 8"),
        ({"flash_attn": "fa2"}, "fa2 computes in bfloat16 only"),
        ({"optim": "adamw_tourch"}, "'adamw_tourch' is not a known optim. Did you mean adamw_torch"),
        ({"optim": "lomo"}, "it steps inside the backward pass"),
        ({"optim": "galore_adamw"}, "projects the gradients of whole weight matrices"),
        ({"freeze_trainable_layers": 1}, "freeze_trainable_layers has no effect with finetuning_type lora"),
        ({"finetuning_type": "full", "use_dora": True}, "use_dora has no effect with finetuning_type full"),
    ],
)
def test_methods_that_do_not_go_together_are_refused_once_each(data: Path, stage: dict[str, Any], message: str) -> None:
    text = problems(recipe(data, **stage))
    assert message in text
    assert "problems" not in text


def test_the_names_of_optimizers_are_those_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}


def test_an_alias_is_read_and_said_once(data: Path) -> None:
    found: Recipe = load_recipe(recipe(data, model_max_length=64))
    assert found.stages[0].data.cutoff_len == 64
    assert found.notes == ("stages.sft.model_max_length is read as cutoff_len",)


def test_every_field_says_what_it_is() -> None:
    documented = {name: record.model_fields[name].description for name, record in FIELDS.items()}
    documented |= {name: field.description for name, field in EvaluationSettings.model_fields.items()}
    assert [name for name, text in documented.items() if not text] == []
    assert len(documented) == 135


def test_derived_values_are_filled_in_and_settings_without_effect_left_out() -> None:
    assert TrainSettings(lora_rank=4).identity() == TrainSettings(lora_rank=4, lora_alpha=8).identity()
    assert TrainSettings(max_steps=3).identity() == TrainSettings(max_steps=3, num_train_epochs=9).identity()
    assert "lora_rank" not in TrainSettings(finetuning_type="full").identity()
    assert (
        TrainSettings(
            per_device_train_batch_size=2, gradient_accumulation_steps=4, nproc_per_node=2
        ).global_batch_size()
        == 16
    )


def test_an_override_with_nothing_behind_it_takes_a_setting_out_and_says_so() -> None:
    recipe = load_recipe("demo", ["stages.sft.seed=7", "stages.sft.seed="])
    assert recipe.notes == ("stages.sft.seed: taken out of the recipe",)
    assert recipe.stages[0].train.seed == load_recipe("demo").stages[0].train.seed
