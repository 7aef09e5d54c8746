"""Loading a base model: precision, bits, attention kernel, stretched positions.

One decision: what a base is loaded with that is not in its files comes from the settings of the stage alone; those that
change its config go into a record beside the adapter, and whoever loads adapter and base together applies them again.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch

from tasks.model import quantised_reason
from tasks.program import ProgramError
from tasks.train.reward import load_scoring

SEPARATING_ATTENTION = ("sdpa", "eager")  # those that keep packed rows apart by position ids also in batches of packs
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}
Changes = dict[str, Any]
"""Fields of a model's config, and what they become."""


def load_base(folder: str, dtype: torch.dtype, score: bool = False, changes: Changes | None = None, **how: Any) -> Any:
    """Load a model from a local folder; safetensors only, no code from the folder is run.

    Args:
        folder: config.json and *.safetensors.
        dtype: what the weights are held in, whatever they were saved in.
        score: with a head that gives one score, instead of the language model's.
        changes: of the model's config.
        **how: what `loading_arguments` made.
    """
    from transformers import AutoModelForCausalLM

    if changes:
        how["config"] = changed_config(folder, changes)
        if score:
            how["config"].num_labels = 1
    try:
        if score:
            model = load_scoring(folder, dtype, **how)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, **how
            )
    except (ValueError, ImportError) as error:
        if "attn_implementation" not in how:
            raise
        raise ProgramError("bad_setting", f"flash_attn: {error}. Use flash_attn: auto.") from error
    keep_weights_as_loaded(model)
    implementation = model.config._attn_implementation
    if implementation not in SEPARATING_ATTENTION and "attn_implementation" not in how:
        model.set_attn_implementation("eager")
    return model


def keep_weights_as_loaded(model: Any) -> None:
    """Have 4-bit layers multiply in one way on every processor.

    On one with bfloat16 instructions, bitsandbytes repacks a layer's weights at its first pass in evaluation mode. From
    there on it rounds inputs to bfloat16 whatever the compute dtype is, and no gradient passes through the layer: a
    reference is no longer the policy's own base, and layers below learn nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def changed_config(folder: str, changes: Changes) -> Any:
    """The config of a model folder with some of its fields changed."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    return config


def refuse_quantised(folder: str) -> None:
    """Refuse to train on weights that are quantised already.

    Raises:
        ProgramError: `bad_setting`; an adapter for them could be merged into nothing.
    """
    reason = quantised_reason(Path(folder))
    if reason:
        raise ProgramError("bad_setting", f"{reason[0]}. {reason[1]}")


def loading_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What the weights are loaded with, beside their dtype.

    Args:
        settings: `TrainSettings.identity()`.
    """
    how: dict[str, Any] = {}
    if settings["flash_attn"] != "auto":
        how["attn_implementation"] = ATTENTION[settings["flash_attn"]]
    if "quant_bit" in settings:
        how |= quantisation(settings)
    return how


def quantisation(settings: dict[str, Any]) -> dict[str, Any]:
    """The base in 8 bits (LLM.int8, arXiv:2208.07339) or 4 (QLoRA, arXiv:2305.14314), on this process's device."""
    from transformers import BitsAndBytesConfig

    if settings["quant_bit"] == 8:
        # it says at every matrix product of float32 inputs that it makes them float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings["quant_type"],
            bnb_4bit_use_double_quant=settings["double_quantization"],
            bnb_4bit_compute_dtype=torch.bfloat16 if settings["bf16"] else torch.float32,
        )
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def stretched_positions(folder: str, kind: str, cutoff_len: int) -> Changes:
    """The fields of a model's config that let it read rows of `cutoff_len` tokens; none when it can.

    `linear` divides positions by the smallest whole factor that is enough, `yarn` does so by wavelength (Peng et al.
    2023, arXiv:2309.00071). `dynamic` raises the base of the wavelengths; transformers takes the one for the longest
    row met so far, which would make a step depend on the steps before it, so here it is the one for `cutoff_len`.

    Raises:
        ProgramError: `bad_setting` for a model without rotary positions, or whose positions are stretched already.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    longest, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if not rope or not longest or "rope_theta" not in rope:
        raise ProgramError("bad_setting", f"rope_scaling: {config.model_type} has no rotary positions to stretch.")
    if cutoff_len <= longest:
        return {}
    if rope.get("rope_type", "default") != "default":
        raise ProgramError(
            "bad_setting",
            f"rope_scaling: the model's positions are stretched already ({rope['rope_type']}), to {longest} tokens; "
            f"cutoff_len is {cutoff_len}. Remove rope_scaling and lower cutoff_len.",
        )
    factor = math.ceil(cutoff_len / longest)
    if kind == "dynamic":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = int(head * rope.get("partial_rotary_factor", 1.0))
        grown = (factor * cutoff_len / longest - (factor - 1)) ** (width / (width - 2))
        rope = rope | {"rope_theta": rope["rope_theta"] * grown}
        return {"max_position_embeddings": cutoff_len, "rope_parameters": rope}
    rope = rope | {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        rope |= {"original_max_position_embeddings": longest}
    return {"max_position_embeddings": longest * factor, "rope_parameters": rope}
