"""Tokens added to a model: what they begin as, that nothing else changes, and that they can be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.graph import build
from registry.home import Home
from registry.loading import load_recipe
from tasks.answers import generate
from tasks.program import Events, ProgramError, Spec
from tasks.steps import Step
from tasks.train.program import work as train
from tasks.vocabulary_program import work
from tests.flows.toy import toy_recipe
from tests.tasks.train.test_methods import make_spec, merge
from tests.tiny import VOCABULARY, tiny_model, write_shards, write_spec

torch.set_num_threads(1)
ADDED, CONTROL = "<yes>", "<|tool|>"


def add(folder: Path, base: Path, tokens: list[str], special: list[str]) -> Path:
    identity = {"add_tokens": tokens, "add_special_tokens": special}
    spec = Spec.read(write_spec(folder, identity, {"base": base}, {}))
    work(spec, Events(spec.events))
    return Path(spec.output)


def tables(folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_rows_are_the_mean_of_the_old_ones_and_old_tokens_keep_their_logits(tmp_path: Path, tied: bool) -> None:
    base = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    output = add(tmp_path / "add", base, [ADDED], [CONTROL])
    model, embedding, head = tables(output)
    plain, before, before_head = tables(base)
    assert (embedding.data_ptr() == head.data_ptr()) is tied
    assert model.config.vocab_size == len(embedding) == VOCABULARY  # 261 tokens were in use, of 264 rows
    found = json.loads((output / "added_tokens_report.json").read_text())
    assert found == {"ids": {ADDED: 261, CONTROL: 262}, "vocabulary": VOCABULARY}
    for token, number in found["ids"].items():
        pieces = list(token.encode())
        torch.testing.assert_close(embedding[number], before[pieces].mean(dim=0))
        torch.testing.assert_close(head[number], before_head[pieces].mean(dim=0))
    ids = torch.tensor([[1, 2, 3, 259]])
    assert torch.equal(model(input_ids=ids).logits[..., :261], plain(input_ids=ids).logits[..., :261])


def test_the_tables_grow_where_there_is_no_row_left(tmp_path: Path) -> None:
    output = add(tmp_path / "add", tiny_model(tmp_path / "base"), [f"<{number}>" for number in range(10)], [])
    model, embedding, head = tables(output)
    assert model.config.vocab_size == len(embedding) == len(head) == 271
    assert embedding.isfinite().all()


def test_every_reader_of_the_tokenizer_gives_a_new_token_one_id(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    listed = {"content": "<pad>", "special": True, "lstrip": False, "normalized": False, "rstrip": False}
    config["added_tokens_decoder"] = {"256": listed | {"single_word": False}}  # as older files have it
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    output = add(tmp_path / "add", base, [ADDED], [CONTROL])
    text = f"a{ADDED}b{CONTROL}c"
    wanted = [97, 261, 98, 262, 99]
    assert Tokenizer.from_file(str(output / "tokenizer.json")).encode(text).ids == wanted
    loaded = AutoTokenizer.from_pretrained(output)
    assert loaded(text, add_special_tokens=False).input_ids == wanted
    assert loaded.decode(wanted, skip_special_tokens=True) == f"a{ADDED}bc"
    assert loaded.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_a_token_that_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="<pad>: there already") as caught:
        add(tmp_path / "add", tiny_model(tmp_path / "base"), [ADDED, "<pad>"], [])
    assert caught.value.kind == "bad_setting"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_learns_to_say_a_new_token(tmp_path: Path, tied: bool) -> None:
    """An embedding that is trained alone never makes a tied model say a new token: both are, and stay one."""
    base = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    grown = add(tmp_path / "add", base, [f"<{number}>" for number in range(10)], [])
    rows = [
        {"input_ids": [*f"say {number}".encode(), 261 + number, 260], "labels": [-100] * 5 + [261 + number, 260]}
        for number in range(10)
    ]
    write_shards(tmp_path / "run" / "shards", rows)
    fields = {"additional_target": ("embeddings",), "learning_rate": 1e-2, "max_steps": 60, "lora_rank": 4}
    spec = Spec.read(make_spec(tmp_path / "run", grown, per_device_train_batch_size=10, **fields))
    spec.inputs["shards"] = str(tmp_path / "run" / "shards")
    train(spec, Events(spec.events))
    merged = merge(tmp_path / "merge", grown, Path(spec.output))
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    asked = [list(f"say {number}".encode()) for number in range(10)]
    assert generate(model, asked, frozenset({260}), 260, 2) == [[261 + number, 260] for number in range(10)]


def test_the_step_comes_first_and_a_later_stage_does_not_repeat_it(tmp_path: Path) -> None:
    raw = json.loads(toy_recipe(tmp_path).read_text())
    stage = raw["stages"]["sft"] | {"dataset": str(tmp_path / "train.jsonl")}
    raw |= {"add_tokens": [ADDED], "model_name_or_path": str(tmp_path / "model"), "evaluation": {}}
    raw["stages"] = {"one": stage, "two": stage | {"model": "one", "add_special_tokens": [CONTROL]}}
    built = build(load_recipe(raw), Home.open()).stages
    first, second = (built[name].trained.inputs["base"].source for name in ("one", "two"))
    assert isinstance(first, Step)
    assert isinstance(second, Step)
    assert (first.title, first.identity) == ("one/add_tokens", {"add_tokens": [ADDED], "add_special_tokens": []})
    assert second.identity == {"add_tokens": [], "add_special_tokens": [CONTROL]}
    assert second.inputs["base"].source is built["one"].model
    assert built["one"].trained.identity["train"]["additional_target"] == ["embeddings"]
    assert built["one"].rendered.inputs["base"].source is first
