"""Prompts and answers in a line: without pads and with what they share there once, all is the same but the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForSequenceClassification

from tasks.sequences import common
from tasks.train.online.inputs import Answered, make_inputs, reads_lines
from tasks.train.online.rollout import Sampling
from tasks.train.online.scoring import token_logps
from tests.tiny import tiny_model

torch.set_num_threads(1)
CPU = torch.device("cpu")
SYSTEM = list(range(100, 112))
SIZES = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}


def answered(*rows: tuple[list[int], list[int]]) -> list[Answered]:
    return [Answered(0, prompt, answer, True, None) for prompt, answer in rows]


def ended(*lengths: int) -> list[list[int]]:
    """Answers of so many tokens."""
    return [[*range(10 * length, 11 * length - 1), 260] for length in lengths]


NINE = [SYSTEM + list(range(1, 1 + n)) + [259] for n in (1, 3, 9, 14)]
CASES = {
    "all-differ": answered(*zip(NINE, ended(3, 1, 4, 2), strict=True)),
    "one-prompt": answered(*zip([NINE[1]] * 3, ended(3, 1, 4), strict=True)),
    "groups": answered(*zip([NINE[2], NINE[2], NINE[3], NINE[3]], ended(3, 1, 4, 2), strict=True)),
    "groups-and-alone": answered(*zip([NINE[3], NINE[0], NINE[3]], ended(3, 1, 4), strict=True)),
    "groups-that-begin-otherwise": answered(
        *zip([[7, *SYSTEM, 9], [7, *SYSTEM, 9], [8, 8, *SYSTEM, 9]], ended(3, 1, 4), strict=True)
    ),
    "one-within-another": answered(*zip([[*SYSTEM, 9], [*SYSTEM, 9, 10], [*SYSTEM, 9]], ended(2, 3, 1), strict=True)),
    "nothing-in-common": answered(([1, 2], [3]), ([4], [5, 6]), ([1, 3], [7])),
}


def test_the_line_of_the_example_is_that() -> None:
    system, first, second = list(range(1, 10)), [10, 11], [20, 21, 22, 23, 24, 25, 26, 27]
    rows = answered((system + first + [5], [60, 61]), (system + first + [5], [70]), (system + second + [5], [80]))
    inputs = make_inputs(rows, CPU, True)
    assert inputs.ids.tolist() == [[*system, *first, *second, 5, 60, 61, 5, 70, 5, 80]]
    assert inputs.given["position_ids"].tolist() == [[*range(11), *range(9, 17), 11, 12, 13, 11, 12, 17, 18]]
    assert inputs.labels.tolist() == [[*[-100] * 20, 60, 61, -100, 70, -100, 80]]
    assert inputs.drawn_from().nonzero()[:, 1].tolist() == [19, 20, 22, 24]
    assert inputs.ends().nonzero()[:, 1].tolist() == [21, 23, 25]
    assert inputs.line is not None
    assert [level.queries.shape for level in inputs.line.levels] == [(1, 9), (2, 8), (3, 3)]
    seen = [
        [row[mask.any(dim=0)].tolist() for row, mask in zip(level.keys, level.mask[:, 0], strict=True)]
        for level in inputs.line.levels
    ]
    one, two = [*range(9), 9, 10], [*range(9), *range(11, 19)]
    assert seen == [[list(range(9))], [one, two], [[*one, 19, 20, 21], [*one, 22, 23], [*two, 24, 25]]]
    last = inputs.line.levels[-1].mask[:, 0]
    assert last.sum(dim=2).tolist() == [[12, 13, 14], [12, 13, 13], [18, 19, 19]]  # itself, and what is before it
    found = torch.cat([level.queries.flatten() for level in inputs.line.levels])
    assert found[inputs.line.back].tolist() == list(range(26))


def test_rows_side_by_side_are_padded_on_the_right() -> None:
    inputs = make_inputs(answered(([1, 2], [3]), ([4], [5, 6, 7])), CPU, False)
    assert inputs.ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert inputs.given["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert inputs.ends().nonzero().tolist() == [[0, 2], [1, 3]]
    assert inputs.drawn_from().nonzero().tolist() == [[0, 1], [1, 0], [1, 1], [1, 2]]
    assert make_inputs(answered(([1, 2], [3])), CPU, False).given == {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path_factory.mktemp("inputs") / "base"))
    assert reads_lines(made)
    return made


def logps(model: Any, rows: list[Answered], share: bool) -> torch.Tensor:
    return token_logps(model, make_inputs(rows, CPU, share), Sampling())


def gradients(model: Any, rows: list[Answered], share: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    found = logps(model, rows, share)
    (found * torch.arange(1.0, len(found) + 1)).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_and_gradients_are_those_of_a_plain_slow_loop(model: Any, name: str) -> None:
    rows = CASES[name]
    line = make_inputs(rows, CPU, True).line
    assert line is not None
    levels = {"nothing-in-common": 1, "groups-and-alone": 3}.get(name, 2)
    assert len(line.levels) == levels
    slow = []
    for item in rows:
        logits = model(input_ids=torch.tensor([item.prompt + item.answer])).logits[0, len(item.prompt) - 1 : -1]
        slow += (-cross_entropy(logits, torch.tensor(item.answer), reduction="none")).tolist()
    assert logps(model, rows, True).tolist() == pytest.approx(slow, abs=1e-5)
    assert logps(model, rows, False).tolist() == pytest.approx(slow, abs=1e-5)
    plain, shared = gradients(model, rows, False), gradients(model, rows, True)
    for key, value in plain.items():
        torch.testing.assert_close(shared[key], value, atol=1e-5 * float(value.abs().max()), rtol=1e-4, msg=key)


def test_activations_computed_again_give_the_same_gradients_to_the_bit(model: Any) -> None:
    model.train()
    for rows in CASES.values():
        wanted = gradients(model, rows, True)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients(model, rows, True)
        model.gradient_checkpointing_disable()
        assert all(torch.equal(again[key], value) for key, value in wanted.items())


FAMILIES = {
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "cohere": CohereConfig(**SIZES),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_models_whose_layers_keep_keys_and_values(family: str) -> None:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa").eval()
    plain = {name: logps(made, rows, False) for name, rows in CASES.items()}
    assert reads_lines(made)
    for name, rows in CASES.items():
        torch.testing.assert_close(logps(made, rows, True), plain[name], atol=2e-5, rtol=1e-4)
        assert torch.equal(logps(made, rows, False), plain[name])  # without a line it is PyTorch's, as before


def test_models_that_forget_or_compute_attention_their_own_way_read_no_lines(tmp_path: Path) -> None:
    others = (
        MistralConfig(**SIZES, sliding_window=8),
        Gemma2Config(**SIZES, head_dim=8),
        FalconConfig(**SIZES, alibi=True),
        BloomConfig(**SIZES),
    )
    for config in others:
        assert not reads_lines(AutoModelForCausalLM.from_config(config))
    base = tiny_model(tmp_path / "base")
    assert reads_lines(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1))
    assert not reads_lines(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"))
    unasked = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="reads_lines is to be asked first"):
        logps(unasked, CASES["groups"], True)


def test_a_model_that_reads_lines_is_saved_as_it_was(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    made = AutoModelForCausalLM.from_pretrained(base)
    made.save_pretrained(tmp_path / "before")
    assert reads_lines(made)
    made.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "config.json").read_bytes() == (tmp_path / "before" / "config.json").read_bytes()


def test_a_line_has_no_pads_and_every_token_that_is_shared_once() -> None:
    for rows in CASES.values():
        inputs = make_inputs(rows, CPU, True)
        heads = {tuple(item.prompt[:-1]) for item in rows}
        shared = common([list(head) for head in heads])
        assert inputs.ids.shape[1] <= sum(map(len, rows)) - shared * (len(rows) - 1)
        assert (inputs.labels != -100).sum() == sum(len(item.answer) for item in rows)
    one_prompt = make_inputs(CASES["one-prompt"], CPU, True)
    assert one_prompt.ids.shape[1] == len(NINE[1]) - 1 + 3 + (3 + 1 + 4)
