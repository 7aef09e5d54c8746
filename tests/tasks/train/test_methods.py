"""Every stage with every tuning method, on a tiny model: what moves, what is saved, what can be made of it.

One decision: what may not move is compared bit by bit, and losses with numbers written down here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from registry.records import TrainSettings
from tasks import merge_program
from tasks.program import Events, ProgramError, Spec
from tasks.train.program import work
from tests.tiny import random_pairs, random_rows, read_lines, tiny_model, write_shards, write_spec

torch.set_num_threads(1)
ROWS = 6
STAGES = ("pt", "sft", "rm", "dpo", "kto", "orpo")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "lora": {},
    "qlora-4": {"quant_bit": 4},
    "qlora-8": {"quant_bit": 8},
}
GOLDEN: dict[tuple[str, str], list[float]] = {
    ("pt", "full"): [7.52129, 7.37752, 6.6862],
    ("pt", "freeze"): [7.52129, 7.55994, 6.80044],
    ("pt", "lora"): [7.52129, 7.56666, 6.8154],
    ("pt", "qlora-4"): [7.21032, 7.50106, 6.71538],
    ("pt", "qlora-8"): [7.54319, 7.58223, 6.8204],
    ("sft", "full"): [7.52129, 7.37752, 6.6862],
    ("sft", "freeze"): [7.52129, 7.55994, 6.80044],
    ("sft", "lora"): [7.52129, 7.56666, 6.8154],
    ("sft", "qlora-4"): [7.21032, 7.50106, 6.71538],
    ("sft", "qlora-8"): [7.54319, 7.58223, 6.8204],
    ("rm", "full"): [1.34972, 0.71584, 0.862788],
    ("rm", "freeze"): [1.34972, 0.898951, 1.07564],
    ("rm", "lora"): [1.34972, 0.851629, 0.876135],
    ("rm", "qlora-4"): [1.08141, 0.922445, 0.9748],
    ("rm", "qlora-8"): [1.34053, 0.858859, 0.868302],
    ("dpo", "full"): [0.693147, 0.561896, 0.755488],
    ("dpo", "freeze"): [0.693147, 0.670218, 0.697976],
    ("dpo", "lora"): [0.693147, 0.696584, 0.728251],
    ("dpo", "qlora-4"): [0.693147, 0.665573, 0.670944],
    ("dpo", "qlora-8"): [0.693373, 0.700927, 0.730383],
    ("kto", "full"): [0.5, 0.52405, 0.470683],
    ("kto", "freeze"): [0.5, 0.506799, 0.494132],
    ("kto", "lora"): [0.5, 0.507355, 0.514738],
    ("kto", "qlora-4"): [0.5, 0.506073, 0.497957],
    ("kto", "qlora-8"): [0.500728, 0.504969, 0.51226],
    ("orpo", "full"): [6.74292, 7.08842, 6.21207],
    ("orpo", "freeze"): [6.74292, 7.3319, 6.12404],
    ("orpo", "lora"): [6.74292, 7.28693, 6.64919],
    ("orpo", "qlora-4"): [6.52842, 7.3167, 6.56184],
    ("orpo", "qlora-8"): [6.73995, 7.25497, 6.63206],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("methods") / "base", hidden_size=64, intermediate_size=128)


def shards(folder: Path, stage: str) -> Path:
    if folder.exists():
        return folder
    if stage == "kto":
        return write_shards(folder, random_rows(ROWS), "labelled", [number % 3 != 0 for number in range(ROWS)])
    if stage in ("pt", "sft"):
        return write_shards(folder, random_rows(ROWS))
    return write_shards(folder, random_pairs(ROWS), "preference")


def make_spec(folder: Path, base: Path, stage: str = "sft", **fields: Any) -> Path:
    inputs = {"base": base, "shards": shards(folder.parent / f"shards-{stage}", stage)}
    inputs |= {name: fields.pop(name) for name in ("adapter",) if name in fields}
    more = {name: fields.pop(name) for name in ("cutoff_len",) if name in fields}
    runtime = {"logging_steps": 1, "save_steps": fields.pop("save_steps", 100), "save_total_limit": 2}
    runtime |= {"gradient_checkpointing": fields.pop("gradient_checkpointing", False), "base_name": "tiny"}
    settings = {"stage": stage, "learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 2} | fields
    identity = {"train": TrainSettings(**settings).identity(), "packing": False, "base_digest": "base-0"}
    return write_spec(folder, identity | more, inputs, runtime)


def train(folder: Path, base: Path, stage: str = "sft", **fields: Any) -> Path:
    """Train a few steps; the artifact's folder."""
    spec = Spec.read(make_spec(folder, base, stage, **fields))
    work(spec, Events(spec.events))
    return Path(spec.output)


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_lines(output.parent / "scratch" / "metrics.jsonl")]


def merge(folder: Path, base: Path, adapter: Path) -> Path:
    spec = Spec.read(write_spec(folder, {"base_digest": "base-0"}, {"base": base, "adapter": adapter}, {}))
    merge_program.work(spec, Events(spec.events))
    return Path(spec.output)


def report(output: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((output / "train.json").read_text())
    return numbers


def updates(adapter: Path) -> dict[str, torch.Tensor]:
    """Name of a weight → what a plain LoRA adapter adds to it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    root = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    state = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace(".lora_B", ""): config["lora_alpha"]
        / root
        * value
        @ state[name.replace(".lora_B", ".lora_A")]
        for name, value in state.items()
        if ".lora_B" in name
    }


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.arange(12)[None]).logits
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_moves_and_nothing_else_and_what_comes_out_can_be_used(
    base: Path, tmp_path: Path, stage: str, method: str
) -> None:
    output = train(tmp_path / "run", base, stage, **METHODS[method])
    assert losses(output) == pytest.approx(GOLDEN[stage, method], rel=1e-4)
    before = load_file(base / "model.safetensors")
    adapts = (output / "adapter_config.json").exists()
    assert adapts == (method not in ("full", "freeze"))
    model = merge(tmp_path / "merged", base, output) if adapts else output
    after = load_file(model / "model.safetensors")
    moved = {name for name, value in before.items() if name in after and not torch.equal(after[name], value)}
    if adapts:
        added = updates(output)
        assert moved == set(added)
        assert len(moved) == report(output)["wrapped"] == 14
        for name, value in added.items():
            assert torch.allclose(after[name] - before[name], value, atol=1e-6)
    elif method == "full":
        assert moved == set(before) - ({"lm_head.weight"} if stage == "rm" else set())
    else:
        assert moved == {name for name in before if ".layers.1." in name}
        groups = report(output)["trained_parameters"]
        assert {name for name in groups if name != "score.weight"} == {name.replace(".1.", ".*.") for name in moved}
    assert set(after) == set(before) | ({"score.weight"} if stage == "rm" else set())
    ids = torch.arange(12)[None]
    if stage == "rm":
        score = AutoModelForSequenceClassification.from_pretrained(model)(input_ids=ids).logits
        assert score.shape == (1, 1)
        assert torch.isfinite(score).all()
    else:
        found = AutoModelForCausalLM.from_pretrained(model).generate(ids, max_new_tokens=4, do_sample=False)
        assert found.shape[1] > 12


def test_quant_bits_differ_and_a_quantised_reference_is_the_policys_own_base(base: Path, tmp_path: Path) -> None:
    fields = {"quant_bit": 4, "quant_type": "fp4", "double_quantization": False}
    one, other = train(tmp_path / "nf4", base, "dpo", quant_bit=4), train(tmp_path / "fp4", base, "dpo", **fields)
    assert losses(one)[0] == losses(other)[0] == pytest.approx(0.693147, abs=1e-6)  # ln 2: policy and reference agree
    assert losses(one)[1] != losses(other)[1]


def test_dora_rslora_and_loraplus_change_what_is_learnt(base: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", base)
    for name, fields in {
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "loraplus": {"loraplus_lr_ratio": 16.0},
        "neftune": {"neftune_noise_alpha": 5.0},
        "sgd": {"optim": "sgd"},
    }.items():
        output = train(tmp_path / name, base, **fields)
        assert losses(output)[1:] != losses(plain)[1:]
        merged = merge(tmp_path / f"{name}-merged", base, output)
        assert json.loads((merged / "merge.json").read_text())["max_logit_difference"] < 1e-4
    state = load_file(tmp_path / "dora" / "output" / "adapter_model.safetensors")
    assert sum(name.endswith("lora_magnitude_vector") for name in state) == 14
    config = json.loads((tmp_path / "rslora" / "output" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 8, 16)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"bf16": True}])
def test_an_adapter_from_singular_values_is_saved_for_the_untouched_base(
    base: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    output = train(tmp_path / "run", base, pissa_init=True, max_steps=2, learning_rate=1e-3, **fields)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["init_lora_weights"]) == (16, False, True)
    state = load_file(output / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
    assert (tuple(a.shape), tuple(b.shape)) == ((16, 64), (64, 16))
    weight = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    scale = 16 / 8**0.5 if fields.get("use_rslora") else 2.0
    assert config["lora_alpha"] / 16 == pytest.approx(scale)
    first = -scale * b[:, 8:] @ a[8:]  # what training began with: the largest singular values of the base
    best = torch.linalg.svdvals(weight)[:8].square().sum()  # 16 iterations find nearly all of it, of any matrix
    assert 0.95 * best < first.square().sum() <= 1.001 * best
    assert torch.linalg.matrix_rank(first, rtol=1e-4) == 8
    if not fields:
        assert losses(output)[0] == pytest.approx(GOLDEN["sft", "lora"][0], rel=1e-4)  # it begins as the base
    model = merge(tmp_path / "merged", base, output)
    numbers = json.loads((model / "merge.json").read_text())
    assert 0 < numbers["max_logit_effect"] < 3.0
    assert numbers["max_logit_difference"] < 1e-4


def test_the_reference_of_singular_value_adapters_is_the_base(base: Path, tmp_path: Path) -> None:
    assert losses(train(tmp_path / "run", base, "dpo", pissa_init=True))[0] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("asked", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_trained_whole_are_saved_merged_and_stay_tied(tmp_path: Path, tied: bool, asked: list[str]) -> None:
    base = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    output = train(tmp_path / "run", base, additional_target=asked)
    assert report(output)["whole_modules"] == (["embed_tokens", "lm_head"] if tied else asked)
    model = AutoModelForCausalLM.from_pretrained(base)
    from peft import PeftModel

    with torch.no_grad():
        wanted = PeftModel.from_pretrained(model, output)(input_ids=torch.arange(12)[None]).logits
    folder = merge(tmp_path / "merged", base, output)
    assert (logits(folder) - wanted).abs().max() < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(folder)
    equal = torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert merged.config.tie_word_embeddings == equal == tied
    before = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(merged.model.embed_tokens.weight, before.model.embed_tokens.weight) == (
        not tied and asked == ["lm_head"]
    )


def test_an_adapter_with_whole_modules_is_continued_and_is_its_own_reference(base: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", base, additional_target=["embed_tokens"], bf16=True)
    saved = load_file(first / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    more = train(tmp_path / "more", base, "dpo", additional_target=["embed_tokens"], adapter=first)
    assert losses(more)[0] == pytest.approx(0.693147, abs=1e-6)
    with pytest.raises(ProgramError, match=r"additional_target is nothing, the adapter has model\.embed_tokens"):
        train(tmp_path / "other", base, adapter=first)


@pytest.mark.parametrize(
    ("fields", "moved"),
    [
        ({"freeze_trainable_layers": -1}, {".layers.0."}),
        ({"freeze_trainable_layers": 2, "freeze_trainable_modules": "mlp,q_proj"}, {".mlp.", ".q_proj."}),
        ({"freeze_trainable_layers": 0, "freeze_extra_modules": "norm"}, {"model.norm."}),
        ({"freeze_trainable_layers": 1, "freeze_extra_modules": ["embed_tokens"]}, {".layers.1.", ".embed_tokens."}),
    ],
)
def test_freeze_moves_what_is_named_bit_exactly(
    base: Path, tmp_path: Path, fields: dict[str, Any], moved: set[str]
) -> None:
    output = train(tmp_path / "run", base, finetuning_type="freeze", **fields)
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(after[name], value) != any(part in name for part in moved), name


def test_with_bf16_the_frozen_part_is_bfloat16_and_the_trained_part_float32(base: Path, tmp_path: Path) -> None:
    output = train(tmp_path / "run", base, finetuning_type="freeze", freeze_trainable_layers=1, bf16=True, save_steps=3)
    held = load_file(tmp_path / "run" / "scratch" / "checkpoints" / "checkpoint-3" / "model.safetensors")
    for name, value in held.items():
        assert value.dtype == (torch.float32 if ".layers.1." in name else torch.bfloat16)
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name], before[name].bfloat16().float())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_trainable_layers": 3}, "freeze_trainable_layers is 3, the model has 2 layers"),
        (
            {"freeze_trainable_modules": "mpl"},
            r"mpl matches no module of a layer\. Did you mean mlp.*self_attn\.q_proj",
        ),
        ({"freeze_extra_modules": "lm_haed"}, r"lm_haed matches no module.*Did you mean lm_head"),
    ],
)
def test_layers_and_modules_that_are_not_there_are_refused(
    base: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProgramError, match=message):
        train(tmp_path / "run", base, finetuning_type="freeze", **fields)
