"""Perplexity of plain text: whole, in windows where it is long, with bits per byte beside it."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.evaluate_program import work
from tasks.program import Events, Spec
from tasks.scoring import RowScore, Shards, bits_per_byte, perplexity, score_rows, windows
from tasks.tokens import load_tokenizer, text_bytes_of_ids
from tasks.train.loading import load_base
from tests.oracle import ORACLE, need_oracle, smollm2, tokenizer_folder
from tests.tiny import tiny_model, write_shards, write_spec

torch.set_num_threads(1)
TEXT = "The quick brown fox — naïve, 敏捷的狐狸 — jumps over the lazy dog. "


def plain_loop(model: Any, ids: Sequence[int], size: int, stride: int) -> tuple[float, int]:
    """NLL and tokens of one text, one window after the other, as the guides of transformers write it down."""
    nll, tokens, end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        before, end = end, min(begin + size, len(ids))
        window = torch.tensor([ids[begin:end]])
        wanted = window.clone()
        wanted[:, : before - begin] = -100
        with torch.inference_mode():
            logits = model(window).logits[0, :-1].double()
        targets = wanted[0, 1:]
        nll += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        tokens += int((targets != -100).sum())
        if end == len(ids):
            break
    return nll, tokens


def evaluate(folder: Path, model: Path, shards: Path, window: int, stride: int, batch_size: int = 2) -> dict[str, Any]:
    """What the program finds on one data set of text."""
    settings = {
        "questions": [],
        "shapes": ["text"],
        "measure": "perplexity",
        "bf16": False,
        "sets": ["0"],
        "window": window,
        "stride": stride,
    }
    inputs = {"model": model, "set.0": shards}
    runtime = {"per_device_eval_batch_size": batch_size, "set_names": ["text"]}
    spec = Spec.read(write_spec(folder, settings, inputs, runtime))
    work(spec, Events(Path(spec.events)))
    found: dict[str, Any] = json.loads((folder / "output" / "results.json").read_text())
    return found


def test_every_token_but_the_first_is_scored_once() -> None:
    for length in range(1, 20):
        for size in range(2, 8):
            for stride in range(1, size):
                scored, end = [], 0
                for begin, stop, first in windows(length, size, stride):
                    assert stop - begin <= size
                    assert begin < first or length == 1  # something stands before what is scored
                    scored += range(first, stop)
                    end = stop
                assert scored == list(range(1, length))
                assert end == length


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_long_text_is_scored_as_by_a_plain_loop_over_its_windows(tmp_path: Path, batch_size: int) -> None:
    folder = tiny_model(tmp_path / "model")
    texts = [list((TEXT * count).encode()) for count in (1, 4, 2)]
    shards = write_shards(tmp_path / "shards", [{"input_ids": ids, "labels": ids} for ids in texts], "text")
    model = load_base(str(folder), torch.float32).eval()
    for size, stride in ((48, 16), (48, 47), (500, 499)):
        found = evaluate(tmp_path / f"{size}-{stride}", folder, shards, size, stride, batch_size)["perplexity.0"]
        nll, tokens = map(sum, zip(*(plain_loop(model, ids, size, stride) for ids in texts), strict=True))
        assert tokens == sum(len(ids) - 1 for ids in texts) == found["tokens"]
        assert found["value"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert found["rows"] == 3


def test_the_padding_side_of_the_tokenizer_and_how_rows_are_split_have_no_influence(tmp_path: Path) -> None:
    folder, rows = tiny_model(tmp_path / "model"), [list((TEXT * count).encode()) for count in (1, 3, 2)]
    shards = write_shards(tmp_path / "one", [{"input_ids": ids, "labels": ids} for ids in rows], "text")
    config = folder / "tokenizer_config.json"
    found = []
    for side in ("left", "right"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": side}))
        found.append(evaluate(tmp_path / side, folder, shards, 500, 499, 3)["perplexity.0"])
    assert found[0] == found[1]
    model = load_base(str(folder), torch.float32).eval()
    parts = [
        score_rows(model, Shards(write_shards(tmp_path / f"{first}", split, "text"), "text"), 3)
        for first, split in enumerate([[{"input_ids": ids, "labels": ids}] for ids in rows])
    ]
    apart = perplexity([score for part in parts for score in part.values()]).result
    assert apart["value"] == pytest.approx(found[0]["value"], rel=1e-6)
    # a batch that is padded on the left, by hand: the same likelihoods
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).double(), ids[:, 1:], reduction="none")
    scored = mask[:, 1:] * mask[:, :-1]
    assert found[0]["nll"] == pytest.approx(float((nll * scored).sum()), rel=1e-5)


def test_bits_per_byte_are_over_the_bytes_of_what_is_scored(tmp_path: Path) -> None:
    assert bits_per_byte([RowScore(math.log(2), 1, 4), RowScore(2 * math.log(2), 3, 2)], 2).result["value"] == 0.5
    folder = tiny_model(tmp_path / "model")
    ids = [*TEXT.encode(), 260]  # a control token stands for no text
    shards = write_shards(tmp_path / "shards", [{"input_ids": ids, "labels": ids}], "text")
    found = evaluate(tmp_path / "found", folder, shards, 512, 511)
    assert found["bits_per_byte.0"]["bytes"] == len(TEXT.encode()) - 1
    bits = found["perplexity.0"]["nll"] / math.log(2)
    assert found["bits_per_byte.0"]["value"] == pytest.approx(bits / (len(TEXT.encode()) - 1))


@pytest.mark.parametrize(
    ("name", "space"),  # a space that the tokenizer puts in front of every text
    [("smollm2", 0), ("qwen3", 0), ("deepseek-v3.1", 0), ("falcon", 0), ("gemma", 0), ("llama2", 1), ("chatglm3", 1)],
)
def test_the_bytes_of_ids_sum_up_to_those_of_their_text(name: str, space: int) -> None:
    folder = tokenizer_folder(name)
    ids = load_tokenizer(folder).encode(TEXT, add_special_tokens=False).ids
    assert int(text_bytes_of_ids(folder)[ids].sum()) == len(TEXT.encode()) + space


@pytest.mark.slow
def test_wikitext_on_a_real_model_equals_a_plain_loop_to_four_digits(tmp_path: Path) -> None:
    need_oracle()
    folder = smollm2()
    text = gzip.decompress((ORACLE / "datasets" / "wikitext-2" / "test.txt.gz").read_bytes()).decode()
    lines = [line for line in text.split("\n") if line.strip()][:12]
    tokenizer, model = load_tokenizer(folder), load_base(str(folder), torch.float32).eval()
    rows = [tokenizer.encode(part, add_special_tokens=True).ids for part in (*lines, text[:2500])]
    shards = write_shards(tmp_path / "shards", [{"input_ids": ids, "labels": ids} for ids in rows], "text")
    found = evaluate(tmp_path / "found", folder, shards, 256, 128, 4)["perplexity.0"]
    nll, tokens = map(sum, zip(*(plain_loop(model, ids, 256, 128) for ids in rows), strict=True))
    assert found["tokens"] == tokens
    assert f"{found['value']:.4g}" == f"{math.exp(nll / tokens):.4g}"
    assert found["value"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
