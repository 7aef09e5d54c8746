"""Attention of rows in a line, and of short rows in bfloat16 gradients nearer to the true ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from tasks.train.online.attention import IN_LINE, MOST_KEYS, make_line
from tests.tiny import tiny_model

torch.set_num_threads(1)
MASK = torch.tensor([[1] * 40, [1] * 33 + [0] * 7])
IDS = torch.arange(80).view(2, 40) + 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("attention") / "base")


def passed(
    base: Path, dtype: torch.dtype, own: bool = False, checkpointing: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of the projections in front of attention."""
    how = IN_LINE if own else "sdpa"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation=how)
    torch.manual_seed(0)
    for value in model.parameters():  # the same numbers in each dtype
        value.data = value.data.normal_(std=0.1).to(torch.bfloat16).to(dtype)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    logits[MASK.bool()].double().logsumexp(-1).sum().backward()
    wanted = ("q_proj", "k_proj", "v_proj")
    grads = {name: value.grad for name, value in model.named_parameters() if any(part in name for part in wanted)}
    return logits.detach(), grads


def far(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The largest difference, relative to the norm of its gradient."""
    return max(float((found[name].double() - true[name]).norm() / true[name].norm()) for name in true)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_are_the_same_to_the_bit_and_gradients_are_no_worse(base: Path, checkpointing: bool) -> None:
    _, true = passed(base, torch.float64)
    plain_logits, plain = passed(base, torch.bfloat16)
    logits, grads = passed(base, torch.bfloat16, True, checkpointing)
    assert torch.equal(logits, plain_logits)
    assert any(not torch.equal(grads[name], plain[name]) for name in grads)
    assert far(grads, true) < 1.1 * far(plain, true) < 0.2


def test_float32_and_long_rows_are_pytorchs_own(base: Path) -> None:
    logits, grads = passed(base, torch.float32)
    again, others = passed(base, torch.float32, True)
    assert torch.equal(logits, again)
    assert all(torch.equal(grads[name], others[name]) for name in grads)
    forward = AttentionInterface()[IN_LINE]
    for count, own in ((MOST_KEYS, True), (MOST_KEYS + 1, False)):
        rows = torch.randn(1, 2, count, 8, dtype=torch.bfloat16, requires_grad=True)
        result, _ = forward(torch.nn.Module(), rows, rows, rows, None, is_causal=True)
        assert ("_Again" in str(result.grad_fn)) == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_a_line_have_the_attention_of_a_plain_slow_loop(dtype: torch.dtype) -> None:
    """Two heads share their keys; rows 4, 5 and 6 go on from row 0, 1 and none."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    query, key, value = (torch.randn(1, heads, 13, 8).to(dtype).requires_grad_() for heads in (2, 1, 1))
    levels = [
        [([], [0, 1, 2])],
        [([0, 1, 2], [3, 4]), ([0, 1, 2], [5])],
        [([0, 1, 2, 3, 4], [6, 7, 8]), ([0, 1, 2, 5], [9]), ([], [10, 11, 12])],
    ]
    line = make_line(levels, torch.device("cpu"))
    forward = AttentionInterface()[IN_LINE]
    found, _ = forward(module, query, key, value, None, line=line, scaling=8**-0.5)
    slow = torch.zeros(13, 2, 8)
    q, k, v = (each[0].float() for each in (query, key, value))
    for rows in levels:
        for before, own in rows:
            for number, place in enumerate(own):
                seen = [*before, *own[: number + 1]]
                weights = (q[:, place] @ k[0, seen].t() * 8**-0.5).softmax(dim=-1)
                slow[place] = weights @ v[0, seen]
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found[0].float(), slow, **near)
    weights = torch.randn(13, 2, 8)
    wanted = torch.autograd.grad((slow * weights).sum(), (query, key, value))
    others = torch.autograd.grad((found[0].float() * weights).sum(), (query, key, value))
    for gradient, other in zip(wanted, others, strict=True):
        torch.testing.assert_close(other, gradient, **near)
    assert line.layers == 1
