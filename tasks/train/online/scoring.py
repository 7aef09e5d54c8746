"""What answers are worth: log-probabilities, expectations and scores.

One decision: answers are scored in the very micro-batches of the first update, so that policy and answers differ there
by nothing at all, and a ratio of 1 can be demanded to the bit. So where a step has one micro-batch, the policy's pass
is kept for that update (`Held`), which would make it again.

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

from tasks.train.likelihood import trained_logits
from tasks.train.online.inputs import Answered, Inputs, make_inputs
from tasks.train.online.roles import Roles
from tasks.train.online.rollout import Sampling


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


@dataclass
class Held:
    """The policy's pass over the only micro-batch of a step, until its first update learns from it."""

    logps: Tensor | None = None
    """[k] with gradients."""

    def take(self) -> Tensor | None:
        """What there is; from then on it is not held."""
        logps, self.logps = self.logps, None
        return logps


def drawn_logits(model: Any, inputs: Inputs, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logits of the distribution that the answers' tokens are drawn from, [k, v] float32, and the tokens, [k]."""
    logits, targets, _ = trained_logits(model, inputs.arguments(model) | {"labels": inputs.labels})
    return sampling.logits(logits, targets), targets


def token_logps(model: Any, inputs: Inputs, sampling: Sampling) -> Tensor:
    """[k] float32 log-probabilities of the answers' tokens, row by row."""
    logits, targets = drawn_logits(model, inputs, sampling)
    return -cross_entropy(logits, targets, reduction="none")


def entropies(logits: Tensor) -> Tensor:
    """[k] float32, in nats, of distributions with logits [k, v]."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


@torch.no_grad()
def score(roles: Roles, answers: Sequence[Answered], sampling: Sampling, held: Held | None = None) -> list[Scored]:
    """Everything about the answers of a micro-batch that does not change while the policy learns from them.

    Args:
        roles: who is asked.
        answers: of the micro-batch.
        sampling: the distribution they were drawn from.
        held: gets the policy's pass.
    """
    inputs = make_inputs(answers, roles.policy.device, roles.share)
    lengths = [len(item.answer) for item in answers]
    with torch.set_grad_enabled(held is not None):
        logits, targets = drawn_logits(roles.policy, inputs, sampling)
        logps = -cross_entropy(logits, targets, reduction="none")
    if held is not None:
        held.logps = logps
    logps, spread = logps.detach(), entropies(logits.detach())
    del logits
    reference = roles.refer(lambda model: token_logps(model, inputs, sampling))
    values: list[list[float] | None] = [None] * len(answers)
    if roles.critic is not None:
        with roles.critic.active():
            values = [value.tolist() for value in roles.critic(inputs, inputs.drawn_from()).cpu().split(lengths)]
    scores: list[float | None] = [None] * len(answers)
    if roles.reward is not None:
        with roles.reward.active():
            scores = list(roles.reward(inputs, inputs.ends()).tolist())
    parts = [value.cpu().split(lengths) for value in (logps, reference, spread)]
    return [
        Scored(own.tolist(), other.tolist(), value, float(entropy.sum()), found)
        for own, other, entropy, value, found in zip(*parts, values, scores, strict=True)
    ]
