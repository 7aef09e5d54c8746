"""The program that brings a base model here: a download from the hub, or a GGUF file made into safetensors.

One decision: GGUF is read once, with the `gguf` package, and only what is known for certain is converted (Llama
weights, byte-level BPE of a known pre-tokenizer); anything else is refused. Loading through transformers gives equal
weights, reads the file three times as long, and behaves differently where its optional kernels are installed.

Run as `python -m tasks.base_program SPEC.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import InputError, Problem
from tasks.base import HUB_FILES, WHERE, HubUnreachable, Note, explain, hub_endpoint, hub_info
from tasks.program import Events, ProgramError, Spec, main

if TYPE_CHECKING:
    import numpy
    import torch
    from gguf import GGUFReader

# GGUF name of a pre-tokenizer → tokenizer.json's. `smollm`: single digits, then GPT-2's split.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
}
CONTROL = 3  # GGUF token type of special tokens; 1 is a normal one
# Keys of GGUF's `llama.` group that are converted; a file with another one has something that would be lost.
LLAMA_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
}
OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def work(spec: Spec, events: Events) -> None:
    """Download or convert, as `settings.source` says.

    Raises:
        ProgramError: `network` when the hub cannot be reached any more, `bad_setting` for a GGUF file of another kind.
        InputError: the hub says no.
    """
    output = Path(spec.output)

    if spec.settings["source"] == "gguf":
        events.note("converting the weights from GGUF to safetensors")
        convert(Path(spec.inputs["gguf"]), output)
        return
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        fetch_hub(spec.settings["repo"], spec.settings["commit"], output, Path(spec.scratch), events.note)
    except HubUnreachable as error:
        raise ProgramError("network", f"the hub went out of reach while downloading: {error}") from error


def fetch_hub(repo: str, commit: str, output: Path, scratch: Path, note: Note) -> None:
    """Download the files of a hub repository that make a model: safetensors, JSON, tokenizer, template.

    Args:
        repo: `owner/name`.
        commit: 40 hex digits.
        output: gets the files.
        scratch: where they are completed first; same file system.
        note: gets a line per file.

    Raises:
        InputError: the hub says no, or the repository has no safetensors.
        HubUnreachable: the connection failed.
    """
    from huggingface_hub import hf_hub_download

    try:
        info = hub_info(repo, commit, timeout=30)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if HUB_FILES.fullmatch(file.rfilename)}
        _require_safetensors(repo, sizes)
        done = 0
        for number, (name, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1]), 1):
            here, all_of_it = f"{done / 1e6:,.0f}", f"{sum(sizes.values()) / 1e6:,.0f}"
            note(f"{repo}: file {number} of {len(sizes)}, {name}; {here} of {all_of_it} MB are here")
            hf_hub_download(repo, name, revision=commit, local_dir=scratch / "hub", endpoint=hub_endpoint())
            done += size
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - every one is raised again, with its meaning
        explain(error, repo, commit)
    for name in sizes:
        (scratch / "hub" / name).rename(output / name)


def _require_safetensors(repo: str, names: Iterable[str]) -> None:
    if not any(name.endswith(".safetensors") for name in names):
        cure = "Use a model that is published as safetensors; other formats can run code when they are read."
        raise InputError(Problem(WHERE, f"{repo} has no model*.safetensors", cure))


def convert(path: Path, output: Path) -> None:
    """Write a GGUF file as a model folder: bfloat16 safetensors, configuration, tokenizer.json and chat template.

    Args:
        path: a Llama in GGUF.
        output: gets config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    Raises:
        ProgramError: `bad_setting` when the file holds something that has no counterpart here.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    config = llama_config(reader)
    specials = special_tokens(reader)
    ids = {f"{name}_token_id": id for name, id in sorted(specials.items()) if name != "unk"}
    _write_json(output / "config.json", config | ids)
    _write_json(output / "generation_config.json", ids)
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    _write_json(output / "tokenizer.json", tokenizer_json(reader, tokens))
    _write_json(output / "tokenizer_config.json", tokenizer_config(reader, tokens, specials))
    _save_weights(reader, config, output / "model.safetensors")


def llama_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a Llama, without token ids.

    Raises:
        ProgramError: `bad_setting` for another architecture or a key that would be lost.
    """
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise _refusal(f"a GGUF file of architecture {architecture!r} cannot be converted, only llama")
    lost = sorted(key for key in reader.fields if key.startswith("llama.") and key[len("llama.") :] not in LLAMA_KEYS)
    if lost:
        raise _refusal(f"the GGUF file has {', '.join(lost)}, which the conversion does not know")

    def value(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    hidden, heads = value("embedding_length"), value("attention.head_count")
    if value("rope.dimension_count") != hidden // heads:
        raise _refusal("the GGUF file rotates a part of each head only, which the conversion does not know")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": value("feed_forward_length"),
        "max_position_embeddings": value("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": value("block_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "rms_norm_eps": _short(value("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_theta": _short(value("rope.freq_base")), "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": value("vocab_size"),
    }


def special_tokens(reader: GGUFReader) -> dict[str, int]:
    """Ids of `bos`, `eos`, `pad` and `unk`, those the file names."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    keys = {name: f"tokenizer.ggml.{long}_token_id" for name, long in names.items()}
    return {name: int(_field(reader, key)) for name, key in keys.items() if key in reader.fields}


def tokenizer_json(reader: GGUFReader, tokens: list[str]) -> dict[str, Any]:
    """tokenizer.json from the vocabulary and merges of a GGUF file; ids are positions in the vocabulary.

    Raises:
        ProgramError: `bad_setting` for a tokenizer other than byte-level BPE, or a split of text that is not known.
    """
    kind, split = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or split not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise _refusal(f"a GGUF tokenizer {kind}/{split} cannot be converted, only gpt2 with {known}")
    types = _field(reader, "tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": id, "content": token, **flags} for id, token in enumerate(tokens) if types[id] == CONTROL]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[split]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _field(reader, "tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(reader: GGUFReader, tokens: list[str], specials: dict[str, int]) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template; `PreTrainedTokenizerFast` takes tokenizer.json as it is."""
    return {
        **{f"{name}_token": tokens[id] for name, id in sorted(specials.items())},
        "add_prefix_space": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _save_weights(reader: GGUFReader, config: dict[str, Any], path: Path) -> None:
    """Unpack every tensor in float32, round it once to bfloat16, save."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".", 2)[-1]
        if kind in heads:
            values = unpermute(values, heads[kind])
        weights[hub_name(tensor.name)] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it to its owner alone


def hub_name(name: str) -> str:
    """The name of a GGUF tensor in a Llama checkpoint.

    >>> hub_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'

    Raises:
        ProgramError: `bad_setting` for a tensor without a counterpart.
    """
    if name in OUTER_TENSORS:
        return OUTER_TENSORS[name]
    block, _, rest = name.partition(".")
    layer, _, kind = rest.partition(".")
    if block != "blk" or not layer.isdigit() or kind not in LAYER_TENSORS:
        raise _refusal(f"the GGUF file has a tensor {name!r}, which the conversion does not know")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}"


def unpermute(values: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows of a query or key projection in the order of Llama checkpoints.

    GGUF keeps the two halves of a head that rotate together side by side (0, 4, 1, 5, 2, 6, 3, 7 for a head of 8);
    checkpoints keep them one after the other.

    Args:
        values: [heads * head_dim, hidden] float32, in GGUF's order.
        heads: query heads or key heads.

    Returns:
        The same rows, [heads * head_dim, hidden].
    """
    rows, hidden = values.shape
    return values.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _refusal(rule: str) -> ProgramError:
    return ProgramError("bad_setting", f"{rule}. Convert the model to safetensors with its own tools.")


def _field(reader: GGUFReader, key: str) -> Any:
    if key not in reader.fields:
        raise _refusal(f"the GGUF file has no {key!r}")
    return reader.fields[key].contents()


def _short(value: float) -> float:
    """A float32 as the shortest decimal that gives it again: 1e-05, not 9.999999747378752e-06."""
    import numpy

    return float(str(numpy.float32(value)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(work)
