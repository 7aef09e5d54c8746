"""Prompts and answers side by side: sharing what rows begin with changes nothing but the work."""

from __future__ import annotations

from itertools import pairwise
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

from tasks.train.online.inputs import Answered, make_inputs, shares_beginnings
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


def test_the_passes_of_the_example_are_those() -> None:
    system, first, second = list(range(1, 10)), [10, 11], [20, 21, 22, 23, 24, 25, 26, 27]
    rows = answered((system + first + [5], [60, 61]), (system + first + [5], [70]), (system + second + [5], [80]))
    inputs = make_inputs(rows, CPU, True)
    assert [item.ids.tolist() for item in inputs.shared] == [[system], [[*first, *[0] * 6], second]]
    assert inputs.last.ids.tolist() == [[5, 60, 61], [5, 70, 0], [5, 80, 0]]
    assert inputs.last.rows.tolist() == [0, 0, 1]
    assert inputs.labels.tolist() == [[-100, 60, 61], [-100, 70, -100], [-100, 80, -100]]
    assert inputs.last.mask.sum(dim=1).tolist() == [len(item) for item in rows]
    assert inputs.last.arguments()["position_ids"].tolist() == [[11, 12, 13], [11, 12, 12], [17, 18, 18]]
    assert inputs.ends().nonzero().tolist() == [[0, 2], [1, 1], [2, 1]]
    assert inputs.drawn_from().nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path_factory.mktemp("inputs") / "base"))


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
    assert bool(make_inputs(rows, CPU, True).shared) == (name != "nothing-in-common")
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
    assert shares_beginnings(model)
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
    "falcon": FalconConfig(**SIZES, new_decoder_architecture=True),
    "falcon-alibi": FalconConfig(**SIZES, alibi=True),
    "bloom": BloomConfig(**SIZES),
}


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, how) for family in FAMILIES for how in ("sdpa", "eager") if (family, how) != ("bloom", "sdpa")],
)
def test_families_of_models_whose_layers_keep_keys_and_values(family: str, attention: str) -> None:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=attention).eval()
    assert shares_beginnings(made)
    for rows in CASES.values():
        torch.testing.assert_close(logps(made, rows, True), logps(made, rows, False), atol=2e-5, rtol=1e-4)


def test_layers_that_forget_do_not_share(tmp_path: Path) -> None:
    assert not shares_beginnings(AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=8)))
    assert not shares_beginnings(AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, head_dim=8)))
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_model(tmp_path / "base"), num_labels=1)
    assert shares_beginnings(judge)


def test_a_pass_goes_on_from_rows_of_the_one_before() -> None:
    for rows in CASES.values():
        inputs = make_inputs(rows, CPU, True)
        for before, after in pairwise([*inputs.shared, inputs.last]):
            width = before.mask.shape[1]
            assert torch.equal(after.mask[:, :width], before.mask[after.rows])
