"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) that keeps less for its gradients: what came in, as it came.

One decision: the values are those of transformers to the bit, by the same operations in the same order; only the
gradient is written out. Autograd keeps what came in as float32. Norms whose weight is trained stay as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

LIKE_LLAMA = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm"}  # of transformers


def keep_less(model: Any) -> int:
    """Let the frozen norms of a model keep less; how many there are."""
    found = [module for module in model.modules() if type(module).__name__ in LIKE_LLAMA]
    found = [module for module in found if not module.weight.requires_grad]
    for module in found:
        module.forward = partial(_forward, module)
    return len(found)


def _forward(norm: Any, x: Tensor) -> Tensor:
    result: Tensor = _Norm.apply(x, norm.weight, norm.variance_epsilon)
    return result


class _Norm(torch.autograd.Function):
    """y = w · (x r) with r = 1 / sqrt(mean(x²) + ε); ∂x = r (g − x r mean(g x r)) for g = w ∂y.

    Shapes: x, y [..., h]; w [h]; r [..., 1], float32. What is computed is float32, results are of x's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        single = x.float()
        root = torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, root, weight)
        return weight * (single * root).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, root, weight = ctx.saved_tensors
        normed, gradient = x.float() * root, (gradient * weight).float()
        shift = (gradient * normed).mean(-1, keepdim=True)
        return gradient.addcmul(normed, shift, value=-1).mul_(root).to(x.dtype), None, None
