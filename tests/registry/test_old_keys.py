"""Arguments of LLaMA-Factory and the earlier LLamaTuner: each has a status, and values mean what they meant there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from registry.old_configs import as_recipe, translate
from registry.old_keys import OLD_KEYS, TRANSFORMERS
from registry.old_keys_page import old_keys_page, status
from registry.old_values import CONVERSIONS, MEANINGS
from registry.stage_settings import ALIASES, FIELDS

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-llama-factory.md"
NAMES = (Path(__file__).parent / "old_names.txt").read_text(encoding="utf-8").split()


def here(key: str) -> str:
    return key


def test_every_argument_of_both_programs_has_a_status() -> None:
    assert len(NAMES) == len(set(NAMES)) == 229
    assert [name for name in NAMES if status(name) == "unknown"] == []


def test_every_argument_of_transformers_has_a_status() -> None:
    from transformers import Seq2SeqTrainingArguments

    assert [field.name for field in fields(Seq2SeqTrainingArguments) if status(field.name) == "unknown"] == []


def test_no_argument_has_two_statuses() -> None:
    tables = (ALIASES.keys(), FIELDS.keys(), OLD_KEYS.keys(), TRANSFORMERS)
    everything = [name for table in tables for name in table]
    assert len(everything) == len(set(everything))
    assert CONVERSIONS.keys() - FIELDS.keys() <= MEANINGS.keys()
    assert MEANINGS.keys() <= CONVERSIONS.keys()
    assert all(key.cure for key in OLD_KEYS.values() if key.refused)


def test_the_page_is_the_one_made_from_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == old_keys_page(), "run `make docs`"


READINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"quantization_bit": 4}, {"quant_bit": 4}),
    ({"quantization_bit": 4, "quantization_method": "BITS_AND_BYTES"}, {"quant_bit": 4}),
    ({"quantization_method": "bnb"}, {}),
    ({"eval_strategy": "steps", "eval_steps": 50}, {"eval_steps": 50}),
    ({"eval_strategy": "steps", "logging_steps": 5}, {"logging_steps": 5, "eval_steps": 5}),
    ({"eval_strategy": "steps"}, {"eval_steps": 500}),
    ({"eval_strategy": "no", "eval_steps": 50}, {"eval_steps": None}),
    ({"evaluation_strategy": False}, {}),
    ({"warmup_steps": 0, "warmup_ratio": 0.1}, {"warmup_ratio": 0.1}),
    ({"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
    ({"warmup_steps": 20, "warmup_ratio": 0.1}, {"warmup_steps": 20, "warmup_ratio": 0.1}),
    ({"neat_packing": True}, {"packing": True}),
    ({"neat_packing": False, "packing": True}, {"packing": True}),
    ({"packing": None, "template": None, "save_total_limit": None}, {}),
    ({"flash_attn": "disabled"}, {"flash_attn": "eager"}),
    ({"flash_attn": "fa2"}, {"flash_attn": "fa2"}),
    ({"disable_gradient_checkpointing": False}, {"gradient_checkpointing": True}),
    ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
    ({"use_unsloth_gc": True}, {"gradient_checkpointing": True}),
    ({"split_special_tokens": True}, {"control_tokens": "plain"}),
    ({"split_special_tokens": False}, {"control_tokens": "keep"}),
    ({"adam8bit": True}, {"optim": "adamw_bnb_8bit"}),
    ({"resume_from_checkpoint": True}, {}),
    ({"resume_from_checkpoint": "out/checkpoint-5"}, {"resume_from_checkpoint": "out/checkpoint-5"}),
    ({"stage": "dpo", "pref_loss": "orpo"}, {"stage": "orpo"}),
    ({"stage": "dpo", "dpo_loss": "ipo"}, {"stage": "dpo", "pref_loss": "ipo"}),
    ({"deepspeed": "examples/deepspeed/ds_z3_offload_config.json"}, {"deepspeed": "zero3_offload"}),
    ({"dataset_dir": "ONLINE"}, {"dataset_dir": None}),
    ({"adapter_name_or_path": ["saves/a"]}, {"adapter_name_or_path": "saves/a"}),
    ({"fp16": False, "streaming": None, "use_galore": False, "do_train": True, "pissa_iter": 16}, {}),
    ({"label_smoothing_factor": 0, "adam_beta1": 0.9, "lr_scheduler_kwargs": {}, "infer_backend": "huggingface"}, {}),
]


@pytest.mark.parametrize(("written", "read"), READINGS, ids=[str(written) for written, _ in READINGS])
def test_values_mean_what_they_meant(written: dict[str, Any], read: dict[str, Any]) -> None:
    found = translate(written, here)
    assert (found.settings, found.problems) == (read, [])
    assert found.without_effect == {}


REFUSED: list[tuple[str, Any, str]] = [
    ("fp16", True, "fp16: true: there is no fp16 training. Use bf16: true, or neither for float32."),
    ("pure_bf16", True, "pure_bf16: true: weights that are trained are held in float32. Use bf16: true, which has"),
    ("quantization_method", "gptq", "quantization_method: 'gptq': bitsandbytes alone quantises a base"),
    ("use_unsloth", True, "use_unsloth: true: unsloth changes a model's code. Use enable_liger_kernel"),
    ("infer_backend", "vllm", "infer_backend: 'vllm': models answer here through transformers. Export the model"),
    ("mixture_of_depths", "convert", "mixture_of_depths: layers are not skipped by tokens. Remove it."),
    ("eval_strategy", "epoch", "eval_strategy: 'epoch': held-out rows are measured every so many steps, not epochs."),
    ("warmup_steps", 2.5, "warmup_steps: 2.5: should be a number of steps"),
    ("pref_loss", "kto_pair", "pref_loss: 'kto_pair': this loss is no longer in any library. Use stage: kto"),
    ("adapter_name_or_path", "a,b", "adapter_name_or_path: 'a,b': one adapter is loaded, not several."),
    ("label_smoothing_factor", 0.1, "label_smoothing_factor: 0.1: the loss has no such part. Remove it."),
    ("freeze_vision_tower", True, "freeze_vision_tower: true: models of texts alone are trained. Remove it."),
    ("use_galore", True, "use_galore: true: GaLore's settings cannot be said. Use optim: galore_adamw"),
    ("use_mca", True, "use_mca: true: Megatron and HyperParallel are not there. Use deepspeed: zero3"),
    ("disable_shuffling", True, "disable_shuffling: true: rows are drawn anew in every epoch."),
    ("ref_model_quantization_bit", 4, "ref_model_quantization_bit: other models are held as they were saved."),
    ("jit_mode_eval", True, "jit_mode_eval: an argument of transformers' TrainingArguments that is not supported"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED, ids=[f"{key}={value}" for key, value, _ in REFUSED])
def test_what_cannot_be_is_refused_with_the_nearest_thing(key: str, value: Any, message: str) -> None:
    (problem,) = translate({key: value}, here).problems
    assert str(problem).startswith(message)


def test_a_secret_is_refused_and_not_repeated() -> None:
    (problem,) = translate({"hf_hub_token": "hf_abc"}, here).problems
    assert "hf_abc" not in str(problem)
    assert "HF_TOKEN" in problem.cure


def test_what_has_no_effect_is_said_with_one_line_for_each_reason() -> None:
    found = translate({"overwrite_cache": True, "plot_loss": True, "report_to": "none", "logging_dir": "x"}, here)
    assert found.notes(here) == [
        "overwrite_cache: no effect; what is prepared is kept, and found by its content",
        "plot_loss, logging_dir: no effect; loss curve, tokens per second and settings of every run are in"
        " MLflow and on Prefect's pages",
    ]


def test_one_setting_under_two_names_is_refused_where_they_differ() -> None:
    assert translate({"quantization_bit": 4, "quant_bit": 4}, here).problems == []
    (problem,) = translate({"quantization_bit": 8, "quant_bit": 4}, here).problems
    assert str(problem) == "quantization_bit: quantization_bit 8 and quant_bit 4 are one setting. Remove one of them."


def test_a_config_of_predict_draws_as_it_did_there() -> None:
    config = {"model_name_or_path": "m", "do_predict": True, "predict_with_generate": True, "eval_dataset": "a,b"}
    recipe, notes, problems = as_recipe(config | {"max_new_tokens": 9, "stage": "sft", "lora_rank": 8})
    drawn = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50}
    assert recipe == {"evaluate": "m", "evaluation": {"generate": "a,b", **drawn, "compare_with": "none"}}
    assert "stage, lora_rank: no effect; nothing is trained" in notes
    assert problems == []


def test_a_config_of_a_benchmark_is_a_recipe_that_measures() -> None:
    config = {"model_name_or_path": "m", "adapter_name_or_path": "saves/a", "task": "cmmlu_test", "n_shot": 3}
    recipe, _, problems = as_recipe(config | {"template": "fewshot", "lang": "zh", "batch_size": 4, "save_dir": "x"})
    asked = {"benchmarks": ["cmmlu"], "num_fewshot": 3, "compare_with": "none"}
    assert recipe == {"evaluate": "saves/a", "per_device_eval_batch_size": 4, "evaluation": asked}
    assert problems == []


def test_a_model_is_measured_in_the_bits_that_a_config_says() -> None:
    recipe, _, problems = as_recipe({"model_name_or_path": "m", "task": "mmlu_test", "quantization_bit": 4})
    assert problems == []
    assert recipe["quant_bit"] == 4
