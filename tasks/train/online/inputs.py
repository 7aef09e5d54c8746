"""Prompts and answers side by side; what they begin with in common goes through the model once, gradients included.

One decision: a micro-batch is a chain of forward passes, each of which finds the keys and values of the ones before it.
The system message of a template is one row instead of as many as there are prompts, and a prompt with several answers
one instead of several. It is the same sum but for rounding, so it is done wherever a model's layers keep keys and
values in the plain way; which is known from its configuration, so a run always does the same.

Example, answers `x y`, `z` to the prompt `s s a .` and `w` to `s s b c .`; an answer is drawn from what comes before
it, so the last token of a prompt belongs to the last pass::

    pass 1   s s                rows 0
    pass 2   a _ , b c          rows 0 0        which rows of the pass before it they go on from
    pass 3   . x y, . z _, . w  rows 0 0 1

Legend: r rows, k tokens of the passes before, q tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tasks.sequences import FEWEST, IGNORED, common
from tasks.train.likelihood import body_of


class _Beginning(DynamicLayer):
    """Keys and values of a layer for one pass. What it is given is not added to what it has: a layer that is computed
    again for its gradients finds the same."""

    made: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Those of the passes before and the new ones, [r, heads, k + q, size] each."""
        if self.keys is None or self.values is None:
            self.made = key_states, value_states
        else:
            self.made = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        return self.made

    def rows(self, index: Tensor) -> _Beginning:
        """What was made, of some rows, for the next pass."""
        found = _Beginning()
        found.keys, found.values = (made.index_select(0, index) for made in self.made)
        found.is_initialized = True
        return found


@dataclass(frozen=True)
class Pass:
    """Rows side by side, padded on the right."""

    ids: Tensor
    """[r, q] int64."""
    mask: Tensor
    """[r, k + q] int64: 0 for pads, those of passes before too."""
    rows: Tensor
    """[r] int64, of the pass before."""

    def arguments(self) -> dict[str, Tensor]:
        """For a model's forward."""
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": positions}


@dataclass(frozen=True)
class Answered:
    """A prompt and the answer that was drawn for it."""

    row: int
    """Number of the prompt in the shards."""
    prompt: list[int]
    answer: list[int]
    """Its terminator included, where it has one."""
    stopped: bool
    """It has one; False when it was cut at `max_new_tokens`."""
    reference: str | None
    """The answer that the data set has."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Inputs:
    """Prompts and answers of a micro-batch."""

    shared: tuple[Pass, ...]
    """What goes ahead; mostly one or two, none where rows have nothing in common."""
    last: Pass
    """It has all positions that answers are drawn from, and their ends."""
    labels: Tensor
    """[r, q] int64 of the last pass: the answers' tokens, `IGNORED` elsewhere."""

    def drawn_from(self) -> Tensor:
        """[r, q] bool: the positions from which an answer's tokens were drawn, each one ahead of its token."""
        places = torch.zeros_like(self.labels, dtype=torch.bool)
        places[:, :-1] = self.labels[:, 1:] != IGNORED
        return places

    def ends(self) -> Tensor:
        """[r, q] bool: the last real token of each row, found by the answer, never by the id of a pad token."""
        answered = self.labels != IGNORED
        steps = torch.arange(answered.shape[1], device=answered.device)
        return steps == (answered * steps).argmax(dim=1, keepdim=True)

    def arguments(self, model: Any) -> dict[str, Any]:
        """For the last pass; those before it are made here, by the model as it is now."""
        if not self.shared:
            mask = {} if bool(self.last.mask.all()) else {"attention_mask": self.last.mask}
            return {"input_ids": self.last.ids, "use_cache": False} | mask
        body = body_of(model)
        layers = [_Beginning() for _ in range(body.config.get_text_config().num_hidden_layers)]
        for item, following in pairwise([*self.shared, self.last]):
            body(**item.arguments(), cache=Cache(layers=list(layers)), use_cache=False)
            layers = [layer.rows(following.rows) for layer in layers]
        return self.last.arguments() | {"cache": Cache(layers=list(layers)), "use_cache": False}


def shares_beginnings(model: Any) -> bool:
    """Whether rows can share beginnings: every layer keeps keys and values, all of them, and attention is PyTorch's.

    Layers that are computed again for their gradients are told that they may read what is kept.
    """
    body = body_of(model)
    config = body.config.get_text_config()
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    if not plain or config._attn_implementation not in ("sdpa", "eager") or getattr(body, "_is_stateful", False):
        return False
    for module in body.modules():
        if hasattr(module, "_can_checkpoint_with_cache"):
            module._can_checkpoint_with_cache = True
    return True


def make_inputs(answers: Sequence[Answered], device: torch.device, share: bool) -> Inputs:
    """The passes of a micro-batch.

    Args:
        answers: its rows.
        device: of the model.
        share: what rows have in common is computed once.
    """
    starts, places, shared = [0] * len(answers), [0] * len(answers), list[Pass]()
    if share and len(answers) > 1:
        heads = [tuple(item.prompt[:-1]) for item in answers]
        unique = list(dict.fromkeys(heads))
        start = common(unique)
        if start:
            shared.append(_pass([unique[0][:start]], None, [0], device))
            starts = [start] * len(answers)
        longest = max(map(len, unique)) - starts[0]
        if len(unique) < len(heads) and longest >= FEWEST and all(unique):
            before = shared[-1].mask if shared else None
            shared.append(_pass([head[starts[0] :] for head in unique], before, [0] * len(unique), device))
            starts, places = [len(head) for head in heads], [unique.index(head) for head in heads]
    rows = list(zip(answers, starts, strict=True))
    rests = [item.prompt[start:] + item.answer for item, start in rows]
    labels = [[IGNORED] * (len(item.prompt) - start) + item.answer for item, start in rows]
    last = _pass(rests, shared[-1].mask if shared else None, places, device)
    width = last.ids.shape[1]
    filled = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels], device=device)
    return Inputs(tuple(shared), last, filled)


def _pass(rows: Sequence[Sequence[int]], before: Tensor | None, places: list[int], device: torch.device) -> Pass:
    width = max(1, *map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    index = torch.tensor(places, device=device)
    return Pass(ids, mask if before is None else torch.cat([before[index], mask], dim=1), index)
