"""RMSNorms that keep less have the values and gradients of transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from tasks.train.norms import LIKE_LLAMA, keep_less

torch.set_num_threads(1)


def norm(name: str, dtype: torch.dtype) -> Any:
    family = name.removesuffix("RMSNorm").lower()
    made = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)(24, eps=1e-5).to(dtype)
    made.weight.data = torch.randn(24, generator=torch.manual_seed(1)).to(dtype)
    return made.requires_grad_(False)


def passed(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out, and the gradient of what went in."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.float().sin().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(LIKE_LLAMA))
def test_values_are_those_of_transformers_to_the_bit_and_gradients_as_near_to_the_exact_ones(
    name: str, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 5, 24, generator=torch.manual_seed(0)).to(dtype)
    exact = norm(name, torch.float64)
    exact.weight.data = norm(name, dtype).weight.double()
    _, wanted = passed(lambda x: exact.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)), x.double())
    plain, lean = norm(name, dtype), norm(name, dtype)
    assert keep_less(torch.nn.ModuleList([lean])) == 1
    (y, own), (found, other) = passed(plain, x), passed(lean, x)
    assert torch.equal(found, y)
    assert found.dtype == other.dtype == dtype
    far = [float((gradient.double() - wanted).norm() / wanted.norm()) for gradient in (own, other)]
    assert far[1] < 1.2 * far[0] < 0.02


def test_what_is_kept_is_what_came_in_and_one_number_of_each_row() -> None:
    module = norm("LlamaRMSNorm", torch.bfloat16)
    keep_less(torch.nn.ModuleList([module]))
    kept: list[torch.Tensor] = []
    x = torch.randn(3, 5, 24).bfloat16().requires_grad_()

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        module(x)
    own = [value for value in kept if value is not module.weight]
    assert [(value.dtype, value.numel()) for value in own] == [(torch.bfloat16, 3 * 5 * 24), (torch.float32, 3 * 5)]


def test_a_norm_whose_weight_is_trained_stays_as_it_is() -> None:
    module = norm("LlamaRMSNorm", torch.float32).requires_grad_(True)
    assert keep_less(torch.nn.ModuleList([module])) == 0
    module(torch.randn(2, 24)).sum().backward()
    assert module.weight.grad is not None
