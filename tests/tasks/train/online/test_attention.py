"""Attention of short rows in bfloat16: the values of PyTorch's, and gradients nearer to the true ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tasks.train.online.attention import MOST_KEYS, float32_gradients
from tests.tiny import tiny_model

torch.set_num_threads(1)
MASK = torch.tensor([[1] * 40, [1] * 33 + [0] * 7])
IDS = torch.arange(80).view(2, 40) + 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("attention") / "base")


def passed(base: Path, dtype: torch.dtype, checkpointing: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of the projections in front of attention."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
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
    with float32_gradients():
        logits, grads = passed(base, torch.bfloat16, checkpointing)
    assert torch.equal(logits, plain_logits)
    assert any(not torch.equal(grads[name], plain[name]) for name in grads)
    assert far(grads, true) < 1.1 * far(plain, true) < 0.2


def test_float32_and_long_rows_are_pytorchs_own(base: Path) -> None:
    logits, grads = passed(base, torch.float32)
    with float32_gradients():
        again, others = passed(base, torch.float32)
        forward = AttentionInterface()["sdpa"]
        long = torch.randn(1, 2, MOST_KEYS + 1, 8, dtype=torch.bfloat16, requires_grad=True)
        result, _ = forward(torch.nn.Module(), long, long, long, None, is_causal=True)
    assert torch.equal(logits, again)
    assert all(torch.equal(grads[name], others[name]) for name in grads)
    assert "_Attention" not in str(result.grad_fn)


def test_behind_it_everything_is_as_it_was() -> None:
    with float32_gradients():
        assert AttentionInterface()["sdpa"] is not sdpa_attention_forward
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
