"""What a language model gives to the tokens of a batch: log-likelihoods of the trained ones.

One decision: logits are made of the trained positions only, (n, v) instead of (b, s, v). With half of the labels
trained that is half of the memory and time of the output head, the largest matrix product of a small model.

Legend: b rows, s sequence, n trained positions, v vocabulary.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tasks.sequences import IGNORED
from tasks.train.reference import unwrapped


def token_loss(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Sum of the negative log-likelihood over the trained tokens of one forward pass.

    Args:
        model: the model, wrapped or not.
        inputs: what `batches.collate` makes, on the model's device.

    Returns:
        float32 scalar; 0 with a gradient of zeros when no label is trained.
    """
    logits, targets, _ = trained_logits(model, inputs)
    return cross_entropy(logits.float(), targets, reduction="sum")


def sequence_logps(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probability of every row's trained tokens.

    Args:
        model: the model, wrapped or not.
        inputs: `input_ids`, `labels` and what else the forward takes, (b, s), on the model's device.

    Returns:
        (b,) float32 sums over tokens, and (b,) int64 tokens.
    """
    logits, targets, kept = trained_logits(model, inputs)
    logps = -cross_entropy(logits.float(), targets, reduction="none")
    rows = kept.nonzero()[:, 0]
    return torch.zeros(len(kept), device=logps.device).index_add(0, rows, logps), kept.sum(dim=1)


def trained_logits(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, v) and targets (n,) of the trained positions, and which they are, (b, s) bool.

    Position i predicts the token at i + 1; row by row, in the order of the tokens.
    """
    arguments = dict(inputs)
    following = arguments.pop("labels")[:, 1:]
    kept = torch.zeros_like(arguments["input_ids"], dtype=torch.bool)
    kept[:, :-1] = following != IGNORED
    if keeps_masked_positions(model):
        logits = model(**arguments, logits_to_keep=kept).logits
    else:
        logits = model(**arguments).logits[kept]
    return logits, following[following != IGNORED], kept


def keeps_masked_positions(model: Any) -> bool:
    """Whether the model's forward takes a (b, s) bool `logits_to_keep`: it does where transformers' helper is used."""
    return hasattr(sys.modules[type(_whole(model)).__module__], "slice_logits_to_keep")


def body_of(model: Any) -> Any:
    """The model without its head, adapters included: what makes hidden states of tokens."""
    inner = _whole(model)
    return getattr(inner, inner.base_model_prefix)


def _whole(model: Any) -> Any:
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT
