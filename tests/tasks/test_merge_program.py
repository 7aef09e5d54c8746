"""The merge program: what is added, what is refused, and what is measured.

One decision: adapters are made with random B matrices, so that a merge that does nothing, or the wrong thing, shows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.merge_program import saved_dtype, tolerance, work
from tasks.program import Events, ProgramError, Spec
from tasks.train.output import copy_tokenizer, save_weights, write_json
from tests.tiny import read_lines, tiny_model, write_spec

torch.set_num_threads(1)  # on matrices this small two threads mostly wait for each other
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 8


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_adapter(folder: Path, base: Path, digest: str = "base-0", zero: bool = False) -> Path:
    """An adapter with random B, or with B = 0 as training starts from."""
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config)
    if not zero:
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.05)
    save_weights(model, folder)
    copy_tokenizer(base, folder)
    write_json(folder / "base.json", {"base_digest": digest})
    return folder


def merge(folder: Path, base: Path, adapter: Path, digest: str = "base-0") -> Path:
    spec = Spec.read(write_spec(folder, {"base_digest": digest}, {"base": base, "adapter": adapter}, {}))
    work(spec, Events(spec.events))
    return Path(spec.output)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_base_plus_scaled_product(tmp_path: Path, dtype: str, tied: bool) -> None:
    base = tiny_model(tmp_path / "base", dtype=dtype, tie_word_embeddings=tied)
    adapter = make_adapter(tmp_path / "adapter", base)
    output = merge(tmp_path / "run", base, adapter)
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    matrices = load_file(adapter / "adapter_model.safetensors")
    assert set(after) == set(before)
    for name, value in before.items():
        part = f"base_model.model.{name.removesuffix('.weight')}"
        assert after[name].dtype == getattr(torch, dtype)
        wanted = value.float()
        if f"{part}.lora_A.weight" in matrices:
            wanted = wanted + ALPHA / RANK * matrices[f"{part}.lora_B.weight"] @ matrices[f"{part}.lora_A.weight"]
            assert not torch.equal(after[name], value)
        assert torch.allclose(after[name].float(), wanted.to(value.dtype).float(), rtol=0.01, atol=1e-6)
    numbers = json.loads((output / "merge.json").read_text())
    assert numbers["dtype"] == dtype == saved_dtype(output)
    assert numbers["max_logit_difference"] < {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    assert numbers["max_logit_effect"] > 0.1
    assert "no_effect" not in numbers


def test_a_merged_tied_model_stays_tied_when_it_is_read_back(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    model = load(merge(tmp_path / "run", base, make_adapter(tmp_path / "adapter", base)))
    assert model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tied_model_whose_head_was_trained_apart_is_untied(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(load(base), config)
    ids = torch.arange(12).reshape(1, 12)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    write_json(tmp_path / "adapter" / "base.json", {"base_digest": "base-0"})
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(load(base), tmp_path / "adapter")(input_ids=ids).logits
        merged = load(merge(tmp_path / "run", base, tmp_path / "adapter"))
        assert (merged(input_ids=ids).logits - wanted).abs().max() < 1e-5
    equal = torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert merged.config.tie_word_embeddings == equal


def test_tokenizer_template_and_generation_config_are_the_adapters_and_the_bases(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / "chat_template.jinja").write_text("the template used in training")
    output = merge(tmp_path / "run", base, adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (adapter / name).read_bytes()
    assert (output / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not (output / "adapter_config.json").exists()


def test_the_same_merge_has_the_same_bytes_in_any_folder(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base)
    one, two = (merge(tmp_path / name, base, adapter) for name in ("one", "two"))
    names = [path.name for path in sorted(one.iterdir())]
    assert names == [path.name for path in sorted(two.iterdir())]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_an_adapter_of_another_base_is_refused_with_both_digests(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model(tmp_path / "base", seed=0), digest="base-0")
    other = tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(ProgramError, match="base-0, this base has base-9") as error:
        merge(tmp_path / "run", other, adapter, digest="base-9")
    assert error.value.kind == "bad_setting"
    assert not list((tmp_path / "run" / "output").iterdir())


def test_an_adapter_of_another_tool_is_merged_and_that_its_base_cannot_be_checked_is_said(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", seed=0)
    adapter = make_adapter(tmp_path / "adapter", base, digest="base-0")
    (adapter / "base.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": "acme/base"})
    merge(tmp_path / "run", base, adapter, digest="base-9")
    notes = [line["text"] for line in read_lines(tmp_path / "run" / "events.jsonl") if line["kind"] == "note"]
    assert "an adapter of another tool, for acme/base: that its base is this one cannot be checked" in notes


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})


def test_an_adapter_of_which_a_part_is_lost_is_refused_instead_of_merged_without_it(tmp_path: Path) -> None:
    base, name = tiny_model(tmp_path / "base"), "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    whole = make_adapter(tmp_path / "adapter", base)
    changes: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        f"1 missing: {name}": lambda tensors: tensors.pop(name),
        f"1 that the model has not: {name}2": lambda tensors: tensors.update({f"{name}2": torch.zeros(64, 4)}),
        "an adapter of another model (size mismatch for ": lambda tensors: tensors.update({name: torch.zeros(0, 4)}),
        "16 missing": lambda tensors: tensors.clear(),  # the 40-byte file of a ZeRO-3 run of other tools
    }
    for number, (words, change) in enumerate(changes.items()):
        adapter = Path(shutil.copytree(whole, tmp_path / f"adapter-{number}"))
        change_tensors(adapter, change)
        with pytest.raises(ProgramError, match=re.escape(words)) as error:
            merge(tmp_path / f"run-{number}", base, adapter)
        assert error.value.kind == "bad_setting"


def test_an_adapter_that_does_nothing_is_said_to(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    output = merge(tmp_path / "run", base, make_adapter(tmp_path / "adapter", base, zero=True))
    numbers = json.loads((output / "merge.json").read_text())
    assert numbers["no_effect"] is True
    assert numbers["max_logit_effect"] == 0.0
    notes = [event["text"] for event in read_lines(tmp_path / "run" / "events.jsonl")]
    assert any("adapter has no effect" in note for note in notes)


def test_a_merge_that_changes_the_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base", dtype="bfloat16")
    monkeypatch.setitem(tolerance.__globals__["TOLERANCE"], "bfloat16", 1e-6)
    with pytest.raises(ProgramError, match=r"differ from base \+ adapter by .*bfloat16 allows"):
        merge(tmp_path / "run", base, make_adapter(tmp_path / "adapter", base))
    assert not (tmp_path / "run" / "output" / "merge.json").exists()


def test_a_base_in_another_dtype_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ProgramError, match="the base holds I8"):
        saved_dtype(tmp_path)


def test_an_adapter_without_a_tokenizer_leaves_the_bases(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink()
    output = merge(tmp_path / "run", base, adapter)
    assert (output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
