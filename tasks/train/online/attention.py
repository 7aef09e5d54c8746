"""Attention of rows that lie in one line, which is computed again for its gradients.

One decision: only attention knows rows. Everything else of a model looks at one token at a time, so it is given all
tokens of a micro-batch as one row without pads (`inputs`); here they are put side by side, level by level, and back.

In a line only queries, keys and values are kept, once, and not what is put side by side of them: attention is the part
whose activations take most beside its operations (Korthikanti et al. 2022, arXiv:2205.05198).

PyTorch's own backward pass of short rows takes twice as long in bfloat16 as in float32 on a processor. Measured on 2
cores with AVX512-BF16, 8 rows, 9 heads of 64, milliseconds of both passes: 53 queries on 77 keys 8.2 in bfloat16 and
3.5 in float32; 256 on 256 18.4 and 16.3 for 4 rows; above that bfloat16 is the quicker one. So below it is float32
there: the values are the ones they were, only the gradients are more exact.

Legend: t tokens of a line, r rows of a level, q tokens of its longest, k tokens that the longest looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IN_LINE = "in_line"  # name among transformers' ways to compute attention; without a line it is PyTorch's
MOST_KEYS = 160  # of a row


@dataclass(frozen=True)
class Level:
    """Rows that look at themselves and at rows of the levels before."""

    queries: Tensor
    """[r, q] int64: places of their tokens; pads have any."""
    keys: Tensor
    """[r, k] int64: places of what each looks at, from its beginning on."""
    mask: Tensor
    """[r, 1, q, k] bool: which of them each query sees."""


@dataclass
class Line:
    """The rows of a line."""

    levels: tuple[Level, ...]
    back: Tensor
    """[t] int64: where each token is among the queries of all levels."""
    layers: int = 0
    """Layers that have asked so far."""

    def longest(self) -> int:
        """k of the last level."""
        return self.levels[-1].keys.shape[1]


def make_line(levels: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], device: torch.device) -> Line:
    """Rows as places in a line.

    Args:
        levels: of every row the places it looks at ahead of itself, and its own.
        device: of the tensors.
    """
    made, where, behind = [], dict[int, int](), 0
    for rows in levels:
        width = max(1, *(len(own) for _, own in rows))
        queries = [[*own, *[0] * (width - len(own))] for _, own in rows]
        seen = [[*before, *own] for before, own in rows]
        longest = max(map(len, seen))
        keys = torch.tensor([[*row, *[0] * (longest - len(row))] for row in seen], device=device)
        starts = torch.tensor([len(before) for before, _ in rows], device=device)
        lengths = torch.tensor([len(row) for row in seen], device=device)
        last = starts[:, None] + torch.arange(width, device=device)  # pads see what is there, so that no sum is empty
        steps = torch.arange(longest, device=device)
        mask = (steps <= last[:, :, None]) & (steps < lengths[:, None, None])
        made.append(Level(torch.tensor(queries, device=device), keys, mask[:, None]))
        for row, (_, own) in enumerate(rows):
            where |= {place: behind + row * width + column for column, place in enumerate(own)}
        behind += len(rows) * width
    return Line(tuple(made), torch.tensor([where[place] for place in range(len(where))], device=device))


_How = tuple[Any, Line | None, Tensor | None, dict[str, Any]]
"""Module, line, mask and other arguments."""


def _attend(how: _How, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[b, q, heads, size] of queries [b, heads, q, size]; in a line b is 1."""
    module, line, mask, keywords = how
    if line is None:
        found: Tensor = sdpa_attention_forward(module, query, key, value, mask, **keywords)[0]
        return found
    every = [each.transpose(1, 2)[0] for each in (query, key, value)]  # [t, heads, size]
    made = []
    for level in line.levels:
        q, k, v = (_picked(*pair) for pair in zip(every, (level.queries, level.keys, level.keys), strict=True))
        made.append(sdpa_attention_forward(module, q, k, v, level.mask, **keywords)[0].flatten(0, 1))
    return torch.cat(made).index_select(0, line.back)[None]


def _picked(values: Tensor, places: Tensor) -> Tensor:
    """[r, heads, n, size] of [t, heads, size], at places [r, n]."""
    return values.index_select(0, places.flatten()).view(*places.shape, *values.shape[1:]).transpose(1, 2)


class _Again(torch.autograd.Function):
    """`_attend`, which keeps queries, keys and values as they came and is computed again, in a dtype, for gradients."""

    @staticmethod
    def forward(ctx: Any, how: _How, dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.how, ctx.dtype = how, dtype
        ctx.save_for_backward(query, key, value)
        return _attend(how, query, key, value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        module, line, mask, keywords = ctx.how
        query, key, value = (each.detach().to(ctx.dtype).requires_grad_() for each in ctx.saved_tensors)
        mask = mask.to(ctx.dtype) if mask is not None and mask.is_floating_point() else mask
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            found = _attend((module, line, mask, keywords), query, key, value)
        made = torch.autograd.grad(found, [query, key, value], gradient.to(ctx.dtype))
        return (None, None, *(each.to(gradient.dtype) for each in made))


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    line: Line | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    how = (module, line, attention_mask, keywords)
    if line is not None:
        line.layers += 1
    longest = key.shape[2] if line is None else line.longest()
    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and longest <= MOST_KEYS
    if not torch.is_grad_enabled() or keywords.get("dropout") or (line is None and not short):
        return _attend(how, query, key, value), None
    return _Again.apply(how, torch.float32 if short else query.dtype, query, key, value), None


AttentionInterface.register(IN_LINE, _forward)
AttentionMaskInterface.register(IN_LINE, sdpa_mask)
