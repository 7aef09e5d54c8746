"""Tiny models and shards, made on the fly.

One decision: the model is a real Llama with a real byte-level tokenizer and chat template, small enough to train in
a second; nothing is downloaded and nothing is mocked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")  # ids 256 to 260
VOCABULARY = 264
SHARD = "data-00000-of-00001.arrow"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer(folder: Path) -> None:
    """Save a tokenizer with one token per byte (id = byte) and the special tokens behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def tiny_model(folder: Path, seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
    """Save a random 2-layer Llama with tied embeddings and the tiny tokenizer.

    Args:
        folder: where to; made when missing.
        seed: of the weights.
        dtype: the weights are saved in it.
        **config: fields of `LlamaConfig` to change, e.g. `tie_word_embeddings=False`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # large enough for logits that differ: 0.02 predicts all tokens alike
        "bos_token_id": 257,
        "eos_token_id": 260,
        "pad_token_id": 256,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(fields | config))).to(getattr(torch, dtype))
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def tiny_scoring_model(folder: Path, seed: int = 0) -> Path:
    """The same with a score head, as a stage of kind rm makes it; the head is always the same."""
    import torch

    from tasks.train.loading import load_base

    load_base(str(tiny_model(folder, seed)), torch.float32, score=True).save_pretrained(folder)
    return folder


def write_shards(
    folder: Path, rows: Sequence[dict[str, list[int]]], shape: str = "chat", marks: Sequence[Any] | None = None
) -> Path:
    """Save rows as a tokenize artifact; one with `seq_lengths` is a sequence of so many rows.

    Args:
        folder: where to.
        rows: `input_ids`, `labels` and perhaps `seq_lengths` each.
        shape: of the rows.
        marks: of each text, for the shapes that have them.
    """
    import numpy
    import pyarrow

    from tasks.canonical import mark_field
    from tasks.packing import Sequences
    from tasks.sequences import describe_shards, write_index
    from tasks.shards import write_shard
    from tasks.tokens import TokenBatch

    folder.mkdir(parents=True)
    counts = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
    lengths = numpy.array([length for parts in counts for length in parts], numpy.int64)
    offsets = numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int64)
    ids = numpy.array([token for row in rows for token in row["input_ids"]], numpy.int32)
    labels = numpy.array([label for row in rows for label in row["labels"]], numpy.int32)
    assert ids[labels != -100].tolist() == labels[labels != -100].tolist()  # a label is the token itself
    zeros = numpy.zeros(len(lengths), numpy.int64)
    if len(lengths):
        batch = TokenBatch(ids, labels != -100, offsets)
        wanted = [pyarrow.array(marks or [None] * len(lengths), kind.type) for kind in mark_field(shape)]
        write_shard(folder / SHARD, batch, zeros, zeros.astype(numpy.int32), shape, *wanted)
    describe_shards(folder, [SHARD] if len(lengths) else [], [], shape)
    parts = numpy.cumsum([0, *map(len, counts)]).astype(numpy.int64)
    write_index(folder, Sequences(parts, numpy.arange(len(lengths)), zeros, lengths))
    return folder


def random_rows(count: int, seed: int = 0, shortest: int = 4, longest: int = 24) -> list[dict[str, list[int]]]:
    """Rows of random bytes; the first third of each is not trained on."""
    import numpy

    random = numpy.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = [int(token) for token in random.integers(0, 256, random.integers(shortest, longest + 1))]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]})
    return rows


def random_pairs(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of answers to one prompt, as sequences of two pieces; answers end with token 260."""
    import numpy

    random = numpy.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = [int(token) for token in random.integers(0, 256, random.integers(2, 6))]
        texts = []
        for _ in ("chosen", "rejected"):
            answer = [*(int(token) for token in random.integers(0, 256, random.integers(1, 9))), 260]
            texts.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        pairs.append(pack_rows(texts))
    return pairs


def pack_rows(rows: Sequence[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Several rows as one packed row."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [len(row["input_ids"]) for row in rows],
    }


def write_spec(folder: Path, settings: dict[str, Any], inputs: dict[str, Path], runtime: dict[str, Any]) -> Path:
    """Write a program's spec with output, scratch, events and failure under `folder`; the spec's path."""
    for name in ("output", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    spec = {
        "settings": settings,
        "runtime": runtime,
        "inputs": {name: str(path) for name, path in inputs.items()},
        "output": str(folder / "output"),
        "scratch": str(folder / "scratch"),
        "events": str(folder / "events.jsonl"),
        "failure": str(folder / "failure.json"),
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, extra = {}, 256
    for byte in range(256):
        if byte in printable:
            table[byte] = chr(byte)
        else:
            table[byte], extra = chr(extra), extra + 1
    return [table[byte] for byte in range(256)]
