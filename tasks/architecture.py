"""The shapes of a model's weights, without loading it.

One decision: shapes are read from the headers of its safetensors files, which hold for every architecture; config.json
gives them only for models like Llama, and beside the headers what no tensor says: heads, tied embeddings, experts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from registry.lora_targets import DEFAULT_TARGETS
from tasks.tensor_files import Tensor, read_headers

LAYER = re.compile(r"\.(\d+)\.")
HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embed_positions", "tok_embeddings")
BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias)$")  # in some published files beside the weights
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")  # whose shapes follow from config.json
SCORE = "score.weight"


@dataclass(frozen=True)
class Architecture:
    """A decoder."""

    tensors: Mapping[str, tuple[int, ...]]
    """Name → shape of every weight; a tied one once."""
    family: str
    """`model_type` of config.json."""
    hidden: int
    """Width h of the residual stream."""
    intermediate: int
    """Width i inside the MLP; of a mixture of experts, of all that one token goes through."""
    layers: int
    heads: int
    """Attention heads for queries."""
    key_value_heads: int
    head_dim: int
    vocabulary: int
    """Token ids v."""
    tied: bool
    """The output head is the embedding."""
    active_experts: float = 1.0
    """Share of the experts' weights that one token goes through."""
    stored_bytes: int = 4
    """Bytes of a number in its files."""

    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.tensors.values()))

    def linear(self) -> dict[str, tuple[int, ...]]:
        """Module → (out, in) of every linear module but the output head and experts, which are no modules of theirs."""
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.tensors.items()
            if len(shape) == 2 and not _named(name, (*HEADS, *EMBEDDINGS, "score")) and ".experts." not in name
        }

    def experts(self) -> int:
        """Number of parameters of all experts."""
        return sum(math.prod(shape) for name, shape in self.tensors.items() if ".experts." in name)

    def gated(self) -> bool:
        """Whether the MLP multiplies two projections."""
        return any(part in name for name in self.tensors for part in ("gate", ".w3.", "experts"))

    def for_scores(self) -> Architecture:
        """The same with a head that gives one score instead of the language model's."""
        kept = {name: shape for name, shape in self.tensors.items() if not _named(name, HEADS)}
        return Architecture(**{**vars(self), "tensors": kept | {SCORE: (1, self.hidden)}})


def layer_of(name: str) -> int | None:
    """Number of the decoder layer a weight belongs to; None: to none."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def wrapped(model: Architecture, targets: list[str]) -> dict[str, tuple[int, ...]]:
    """Module → (out, in) of those that get LoRA matrices with `lora_target`."""
    names = list(DEFAULT_TARGETS.get(model.family, ())) if "default" in targets else targets
    return {
        module: shape
        for module, shape in model.linear().items()
        if "all" in targets or any(f".{module}".endswith(f".{name}") for name in names)
    }


def read_architecture(folder: Path) -> Architecture | None:
    """The architecture of a model folder; None for one that says too little: no weights here and not like Llama, or a
    config without layers and heads."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= config.get("text_config") or {}
    if "hidden_size" not in config and "n_embd" in config:  # GPT-2's names
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        config |= {name: config[old] for name, old in names.items()}
    if any(name not in config for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")):
        return None
    saved = list(read_headers(folder))
    tensors = {tensor.name: tensor.shape for tensor in saved if not BUFFERS.search(tensor.name)}
    if not tensors:
        if config.get("model_type") not in LIKE_LLAMA:
            return None
        tensors = shapes_like_llama(config)
    return replace(describe(config, tensors), stored_bytes=_stored_bytes(next(iter(saved), None), config))


def describe(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The architecture of a config, text config merged in, and its weights' shapes."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = [name for name in tensors if _named(name, HEADS)]
    tied = config.get("tie_word_embeddings", not head) or not head
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0
    chosen = config.get("num_experts_per_tok") or 1
    names = (*(("moe_intermediate_size",) if experts else ()), "intermediate_size", "n_inner")
    wide = next((config[name] for name in names if config.get(name)), 4 * hidden)
    return Architecture(
        tensors={name: shape for name, shape in tensors.items() if not (tied and name in head)},
        family=config.get("model_type", ""),
        hidden=hidden,
        intermediate=wide * (chosen if experts else 1),
        layers=config["num_hidden_layers"],
        heads=heads,
        key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocabulary=config["vocab_size"],
        tied=bool(tied),
        active_experts=chosen / experts if experts else 1.0,
    )


def _stored_bytes(first: Tensor | None, config: Mapping[str, Any]) -> int:
    """Of the first tensor, or as the config says."""
    kinds = {"F32": 4, "float32": 4, "F64": 8}  # all others take two
    saved = first.dtype if first else config.get("dtype") or config.get("torch_dtype") or "float32"
    return kinds.get(saved, 2)


def shapes_like_llama(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of a Llama, Mistral, Qwen2 or Qwen3, from config.json."""
    hidden, wide, family = config["hidden_size"], config["intermediate_size"], config["model_type"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    modules = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    parts: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in modules.items()}
    parts |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (hidden,))
    if family == "qwen3":
        parts |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (size,))
    for name, shape in modules.items():
        if name.startswith("mlp"):
            has_bias = config.get("mlp_bias", False)
        else:
            has_bias = config.get("attention_bias", family == "qwen2" and not name.endswith("o_proj"))
        parts |= {f"{name}.bias": shape[:1]} if has_bias else {}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in parts.items()}
    return shapes | {"lm_head.weight": (config["vocab_size"], hidden)}


def _named(tensor: str, names: tuple[str, ...]) -> bool:
    """Whether a weight belongs to a module of one of these names, outside the decoder layers."""
    return layer_of(tensor) is None and any(part in names for part in tensor.split("."))
