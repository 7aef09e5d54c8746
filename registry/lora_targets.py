"""Modules that `lora_target: default` means, by model family.

One decision: keyed by `model_type` of config.json. The names are the ends of module names, as in `lora_target` itself.
"""

from __future__ import annotations

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOOM = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
LIKE_LLAMA = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "yi", "xverse", "smollm3"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2", "olmo", "olmo2"),
)
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LIKE_LLAMA, LLAMA),
    **dict.fromkeys(("bloom", "falcon", "chatglm", "gpt_neox"), BLOOM),
    "baichuan": ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen": ("c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"),
    "internlm2": ("wqkv", "wo", "w1", "w2", "w3"),
    "glm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm4": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
