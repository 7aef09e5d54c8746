"""Configs as people have them for LLaMA-Factory and the earlier LLamaTuner, written for these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.flows.toy import write_rows
from tests.tiny import tiny_model

Config = dict[str, Any]
MODEL: Config = {"model_name_or_path": "model", "trust_remote_code": True}
DATA: Config = {
    "template": "qwen",
    "cutoff_len": 256,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 2,
    "dataloader_num_workers": 4,
}
OUTPUT: Config = {
    "output_dir": "saves/tiny",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
}
TRAINING: Config = {
    "do_train": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
EVALUATION: Config = {"val_size": 0.1, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500}
COMMON: Config = {**MODEL, **DATA, **OUTPUT, **TRAINING}
LORA: Config = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
SFT: Config = {**COMMON, **LORA, "stage": "sft", "dataset": "identity,rows"}
FULL: Config = {**COMMON, "stage": "sft", "finetuning_type": "full", "dataset": "identity"}
DPO: Config = {**COMMON, **LORA, "stage": "dpo", "dataset": "pairs", "pref_beta": 0.1, "pref_loss": "sigmoid"}
# What a page in a browser writes out: everything, defaults too.
WRITTEN_OUT: Config = {
    "enable_thinking": True,
    "flash_attn": "auto",
    "include_num_input_tokens_seen": True,
    "lora_alpha": 16,
    "lora_dropout": 0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "packing": False,
    "save_strategy": "steps",
    "warmup_steps": 0,
    "max_steps": -1,
    "fp16": False,
    "pure_bf16": False,
    "use_unsloth": False,
    "use_galore": False,
    "neat_packing": False,
    "train_on_prompt": False,
    "mask_history": False,
    "double_quantization": True,
    "quantization_bit": 4,
    "quantization_method": "bnb",
    "shift_attn": False,
    "use_swanlab": False,
    "resize_vocab": False,
}
EARLIER: Config = {
    "model_name_or_path": "model",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "identity",
    "template": "qwen",
    "cutoff_len": 1024,
    "overwrite_cache": True,
    "output_dir": "work_dir/qlora",
    "save_strategy": "steps",
    "save_total_limit": 5,
    "report_to": "wandb",
    "wandb_project": "llamatuner",
    "wandb_run_name": "tiny_qlora",
    "gradient_checkpointing": True,
    "eval_dataset_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 500,
}

GOOD: dict[str, Config] = {
    "lora_sft": SFT | EVALUATION,
    "lora_sft_written_out": SFT | WRITTEN_OUT,
    "lora_pretrain": COMMON | LORA | {"stage": "pt", "dataset": "wiki", "template": None},
    "lora_reward": COMMON | LORA | {"stage": "rm", "dataset": "pairs"},
    "lora_dpo": DPO,
    "lora_dpo_ipo": DPO | {"pref_loss": "ipo", "pref_ftx": 0.5},
    "lora_dpo_simpo": DPO | {"pref_loss": "simpo", "simpo_gamma": 0.5, "pref_beta": 2.0},
    "lora_dpo_orpo": DPO | {"pref_loss": "orpo"},
    "lora_kto": COMMON | LORA | {"stage": "kto", "dataset": "marked", "pref_beta": 0.1},
    "lora_ppo": COMMON
    | LORA
    | {"stage": "ppo", "dataset": "identity", "reward_model": "reward", "reward_model_type": "lora"}
    | {"max_new_tokens": 16, "top_k": 0, "top_p": 0.9},
    "lora_sft_ds3": SFT | {"deepspeed": "examples/deepspeed/ds_z3_config.json"},
    "full_sft": FULL | {"deepspeed": "examples/deepspeed/ds_z2_offload_config.json"},
    "freeze_sft": COMMON
    | {"stage": "sft", "dataset": "identity", "finetuning_type": "freeze"}
    | {"freeze_trainable_layers": 1, "freeze_trainable_modules": "all"},
    "qlora_bitsandbytes": SFT | {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False},
    "qlora_8": SFT | {"quantization_bit": 8, "quantization_method": "bitsandbytes"},
    "rslora": SFT | {"use_rslora": True, "lora_alpha": 16},
    "dora": SFT | {"use_dora": True},
    "pissa": SFT | {"pissa_init": True, "pissa_iter": 16, "pissa_convert": True},
    "loraplus": SFT | {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-6},
    "packing": SFT | {"packing": True},
    "neat_packing": SFT | {"neat_packing": True, "flash_attn": "sdpa"},
    "new_tokens": SFT | {"add_special_tokens": "<a>,<b>", "resize_vocab": True, "additional_target": "embeddings"},
    "warmup_steps": SFT | {"warmup_steps": 20},
    "streaming": SFT | {"streaming": True, "buffer_size": 128, "max_steps": 10},
    "interleaved": SFT | {"mix_strategy": "interleave_under", "interleave_probs": "0.7,0.3"},
    "held_out": SFT | {"eval_dataset": "rows", "eval_on_each_dataset": True, "do_eval": True},
    "best": SFT | EVALUATION | {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
    "earlier_qlora": EARLIER | {"use_qlora": True, "quant_bit": 4, "quant_type": "nf4", "double_quant": True},
    "earlier_lora": EARLIER | {"lora_target": "q_proj,v_proj", "optim": "adamw_torch", "weight_decay": 0.0},
    "predict": MODEL
    | DATA
    | {"stage": "sft", "do_predict": True, "finetuning_type": "lora", "eval_dataset": "identity,rows"}
    | {"output_dir": "saves/predict", "per_device_eval_batch_size": 1, "predict_with_generate": True},
    "evaluate_loss": MODEL | DATA | {"stage": "sft", "do_train": False, "do_eval": True, "eval_dataset": "rows"},
    "train_and_predict": SFT | {"do_predict": True, "predict_with_generate": True, "eval_dataset": "rows"},
    "benchmark": MODEL
    | {"finetuning_type": "lora", "task": "mmlu_test", "template": "fewshot", "lang": "en", "n_shot": 5}
    | {"save_dir": "saves/eval", "batch_size": 4, "task_dir": "evaluation"},
}

REFUSED: dict[str, tuple[Config, set[str]]] = {
    "fp16": (EARLIER | {"fp16": True}, {"fp16"}),
    "pure_bf16": (SFT | {"bf16": False, "pure_bf16": True}, {"pure_bf16"}),
    "galore": (FULL | {"use_galore": True, "galore_rank": 128}, {"use_galore"}),
    "badam": (SFT | {"use_badam": True, "badam_mode": "layer"}, {"use_badam"}),
    "muon": (SFT | {"use_muon": True}, {"use_muon"}),
    "mixture_of_depths": (SFT | {"mixture_of_depths": "convert"}, {"mixture_of_depths"}),
    "llama_pro": (SFT | {"finetuning_type": "lora", "use_llama_pro": True}, {"use_llama_pro"}),
    "oft": (FULL | {"finetuning_type": "oft", "oft_block_size": 16}, {"finetuning_type", "oft_block_size"}),
    "aqlm": (SFT | {"quantization_bit": 4, "quantization_method": "aqlm"}, {"quantization_method"}),
    "images": (
        SFT | {"image_max_pixels": 262144, "freeze_vision_tower": True},
        {"image_max_pixels", "freeze_vision_tower"},
    ),
    "vllm": (SFT | {"infer_backend": "vllm"}, {"infer_backend"}),
    "warmup_steps": (SFT | {"warmup_steps": -1}, {"warmup_steps"}),
    "a_token": (SFT | {"hf_hub_token": "hf_secret"}, {"hf_hub_token"}),
    "scheduler": (SFT | {"lr_scheduler_type": "cosine_with_restarts"}, {"lr_scheduler_type"}),
    "epochs": (SFT | {"val_size": 0.1, "eval_strategy": "epoch"}, {"eval_strategy"}),
    "merge": (
        MODEL
        | {"adapter_name_or_path": "saves/a", "template": "qwen", "finetuning_type": "lora"}
        # `export_legacy_format` says nothing where it is off
        | {"export_dir": "out", "export_size": 2, "export_device": "cpu", "export_legacy_format": False},
        {"export_dir", "export_size", "export_device", "dataset"},
    ),
}
"""Name → config, and what its errors are about."""

INFO = {
    "identity": {"file_name": "identity.json"},
    "rows": {"file_name": "rows.jsonl", "columns": {"prompt": "instruction", "response": "output"}},
    "wiki": {"file_name": "wiki.jsonl", "columns": {"prompt": "text"}},
    "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt"}
    | {"columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
    "marked": {"file_name": "marked.json", "formatting": "sharegpt"}
    | {"columns": {"messages": "messages", "kto_tag": "label"}}
    | {"tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
}


def make_workplace(folder: Path) -> Path:
    """A working directory as LLaMA-Factory has one, with `data/dataset_info.json`, and a tiny model in it."""
    (folder / "data").mkdir()
    tiny_model(folder / "model")
    write_rows(folder / "data" / "rows.jsonl", 12)
    write_rows(folder / "lines", 24, "hello")
    identity = [json.loads(line) for line in (folder / "lines").read_text().splitlines()]
    asked = [{"from": "human", "value": "hi"}]
    pairs = [
        {"conversations": asked, "chosen": {"from": "gpt", "value": f"good {n}"}, "rejected": _said(f"bad {n}")}
        for n in range(12)
    ]
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"answer {n}"}] for n in range(12)]
    marked = [{"messages": turn, "label": n % 2 == 0} for n, turn in enumerate(turns)]
    wiki = "".join(json.dumps({"text": f"Line {n} of a text about lines."}) + "\n" for n in range(12))
    (folder / "data" / "wiki.jsonl").write_text(wiki)
    for name, rows in (("identity", identity), ("pairs", pairs), ("marked", marked)):
        (folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    return folder


def _said(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def write_config(folder: Path, name: str, config: dict[str, Any]) -> str:
    (folder / "examples").mkdir(exist_ok=True)
    path = folder / "examples" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return f"examples/{name}.yaml"
