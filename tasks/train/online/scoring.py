"""What answers are worth: log-probabilities, expectations and scores, without gradients.

One decision: answers are scored in the very micro-batches of the first update, so that policy and answers differ there
by nothing at all, and a ratio of 1 can be demanded to the bit.

Legend: b answers of a micro-batch, s tokens of the longest prompt and answer, n tokens of the longest answer,
k tokens of all its answers, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tasks.sequences import IGNORED
from tasks.train.batches import collate
from tasks.train.likelihood import trained_logits
from tasks.train.online.roles import Roles
from tasks.train.online.rollout import Sampling


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
class Scored:
    """What was found of an answer; lists of its n tokens."""

    logps: list[float]
    reference: list[float]
    values: list[float] | None
    """What the critic expects; None without one."""
    entropy: float
    """Sum over its tokens, in nats."""
    score: float | None
    """The reward model's; None without one."""


def make_inputs(answers: Sequence[Answered], device: torch.device) -> dict[str, Any]:
    """`input_ids`, `labels` (of answers only) and `attention_mask`, [b, s], padded on the right."""
    rows = [
        {
            "input_ids": item.prompt + item.answer,
            "labels": [IGNORED] * len(item.prompt) + item.answer,
            "seq_lengths": [len(item)],
        }
        for item in answers
    ]
    inputs = collate(rows, packing=False).inputs
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def drawn_from(inputs: dict[str, Any]) -> Tensor:
    """[b, s] bool: the positions from which an answer's tokens were drawn, each one ahead of its token."""
    places = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    places[:, :-1] = inputs["labels"][:, 1:] != IGNORED
    return places


def ends_of(inputs: dict[str, Any]) -> Tensor:
    """[b, s] bool: the last real token of each row, found by the answer, never by the id of a pad token."""
    answered = inputs["labels"] != IGNORED
    steps = torch.arange(answered.shape[1], device=answered.device)
    return steps == (answered * steps).argmax(dim=1, keepdim=True)


def drawn_logits(model: Any, inputs: dict[str, Any], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logits of the distribution that the answers' tokens are drawn from, [k, v] float32, and the tokens, [k]."""
    logits, targets, _ = trained_logits(model, inputs)
    return sampling.logits(logits, targets), targets


def token_logps(model: Any, inputs: dict[str, Any], sampling: Sampling) -> Tensor:
    """[k] float32 log-probabilities of the answers' tokens, row by row."""
    logits, targets = drawn_logits(model, inputs, sampling)
    return -cross_entropy(logits, targets, reduction="none")


def entropies(logits: Tensor) -> Tensor:
    """[k] float32, in nats, of distributions with logits [k, v]."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


@torch.no_grad()
def score(roles: Roles, answers: Sequence[Answered], sampling: Sampling) -> list[Scored]:
    """Everything about the answers of a micro-batch that does not change while the policy learns from them."""
    inputs = make_inputs(answers, roles.policy.device)
    lengths = [len(item.answer) for item in answers]
    logits, targets = drawn_logits(roles.policy, inputs, sampling)
    logps, spread = -cross_entropy(logits, targets, reduction="none"), entropies(logits)
    del logits
    reference = roles.refer(lambda model: token_logps(model, inputs, sampling))
    values: list[list[float] | None] = [None] * len(answers)
    if roles.critic is not None:
        with roles.critic.active():
            values = [value.tolist() for value in roles.critic(inputs, drawn_from(inputs)).cpu().split(lengths)]
    scores: list[float | None] = [None] * len(answers)
    if roles.reward is not None:
        with roles.reward.active():
            scores = list(roles.reward(inputs, ends_of(inputs)).tolist())
    parts = [value.cpu().split(lengths) for value in (logps, reference, spread)]
    return [
        Scored(own.tolist(), other.tolist(), value, float(entropy.sum()), found)
        for own, other, entropy, value, found in zip(*parts, values, scores, strict=True)
    ]
