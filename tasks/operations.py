"""The floating-point operations of a training.

One decision: they are counted from the shapes of the weights and the lengths of the rows, so a step's share of what a
device can do follows from its time alone.
"""

from __future__ import annotations

import math
from typing import Any

from tasks.architecture import Architecture
from tasks.estimate import has_reference, layers_passed, of_head, trained_weights


def step_flops(
    model: Architecture, settings: dict[str, Any], tokens: int, trained_tokens: int, squared_lengths: int
) -> float:
    """Floating-point operations that one optimizer step needs.

    A matrix of N weights takes 2 N operations per token forward, 2 N backward for its input and, where it is trained,
    2 N for itself: 6 N when everything is. Attention over s tokens takes 4 L q s forward and twice that backward, L
    layers of q = heads x head_dim: together the 6 N + 12 L q s per token of the source. What differs here: a frozen
    matrix takes 4 N, LoRA's own 6 times theirs; layers below the first trained one have no backward pass; the output
    head works on trained positions only; a row is as long as it is and not as its batch; forward passes of a reference
    are counted. Activations computed a second time are not: they are no work of the model's.

    One layer of a [4, 3] matrix beside q = 2 and a [5, 3] head, all trained, two rows of 2 tokens, 2 of the 4 tokens
    trained: 6 x 12 x 4 + 6 x 15 x 2 + 12 x 1 x 2 x (4 + 4) = 288 + 180 + 192 = 660.

    Args:
        model: as it is in its files.
        settings: `TrainSettings.identity()`.
        tokens: of the step, all processes.
        trained_tokens: those with a label.
        squared_lengths: sum of the squared lengths of its rows.

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """
    model = model.for_scores() if settings["stage"] == "rm" else model
    trained = trained_weights(model, settings)
    layers, passed = model.layers, layers_passed(model, settings)
    body = sum(math.prod(shape) for shape in model.linear().values()) + model.experts() * model.active_experts
    matrices = sum(size for name, size in trained.items() if name.endswith(".lora"))
    linear = model.linear()
    moved = float(sum(size for name, size in trained.items() if name.removesuffix(".weight") in linear))
    moved += model.active_experts * sum(size for name, size in trained.items() if ".experts." in name)
    head = 0 if settings["stage"] == "rm" else model.hidden * model.vocabulary
    attention = 4.0 * layers * model.heads * model.head_dim * squared_lengths
    forward = 2.0 * body * tokens + 2.0 * head * trained_tokens + attention
    share = passed / layers
    backward = share * (2.0 * body * tokens + 2.0 * attention) + 2.0 * head * trained_tokens
    backward += 2.0 * moved * tokens + (2.0 * head * trained_tokens if of_head(model, trained) else 0.0)
    frozen = 0
    if has_reference(settings):  # kto estimates its distance with one more pass of both over rows as long
        frozen = 3 if settings["stage"] == "kto" else 1
    return forward * (1 + frozen) + backward + 6.0 * matrices * tokens
