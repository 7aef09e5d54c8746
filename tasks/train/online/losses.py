"""What policy and critic minimise, token by token, and what part each token has in the mean.

Legend: k real tokens of a micro-batch, m its answers.

Sources: Schulman et al. 2017, arXiv:1707.06347, eq. 7; clipped values: Huang et al. 2022, "The 37 implementation
details of proximal policy optimization", detail 9; means: Yu et al. 2025, arXiv:2503.14476 (dapo), Liu et al. 2025,
arXiv:2503.20783 (dr_grpo).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.train.online.advantages import k3

BIGGEST = 20.0  # of a log ratio whose exponential is taken


def policy_loss(change: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """−min(ρ A, clip(ρ, 1 ± ε) A) of every token, and whether the clipped part is the smaller one.

    log ρ 0.5 and −0.5, A 1, ε 0.2: losses −1.2 and −0.606531; the first one is clipped.

    Args:
        change: [k] log ρ, of the policy now to the one that drew the tokens.
        advantages: [k].
        cliprange: ε.

    Returns:
        [k] float32, [k] bool.
    """
    ratio = change.clamp(-BIGGEST, BIGGEST).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, clipped), clipped > free


def kl_loss(change: Tensor, ratio: Tensor) -> Tensor:
    """The KL penalty of every token: k3 by the probability now to that it was drawn with, whose expectation has the
    gradient of the KL divergence.

    log ρ 0.5, log ratio to the reference 0.5: 1.648721 x 0.106531 = 0.175639.

    Args:
        change: [k] log ρ.
        ratio: [k] log π − log π_ref.

    Source: DeepSeek-V3.2, arXiv:2512.02556, section 3.1.
    """
    return change.clamp(-BIGGEST, BIGGEST).exp() * k3(ratio.clamp(min=-BIGGEST))


def value_loss(values: Tensor, before: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """½ max((V − R)², (V_clipped − R)²) of every token, V_clipped at most ε from what it was.

    V 1, before 0, R 2, ε 0.2: ½ max(1, 3.24) = 1.62, the clipped part.

    Args:
        values: [k] of the critic now.
        before: [k] of the critic when the tokens were drawn.
        returns: [k].
        cliprange: ε.

    Returns:
        [k] float32, [k] bool.
    """
    clipped = before + (values - before).clamp(-cliprange, cliprange)
    free, bound = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(free, bound), bound > free


def of_answers(change: Tensor, lengths: Tensor) -> Tensor:
    """The sum over an answer's tokens, at each of them: log ρ of the whole answer.

    >>> of_answers(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2, 1])).tolist()
    [3.0, 3.0, 5.0]

    Args:
        change: [k] log ρ of tokens, answer by answer.
        lengths: [m] int64.
    """
    answers = torch.repeat_interleave(torch.arange(len(lengths), device=change.device), lengths)
    return change.new_zeros(len(lengths)).index_add(0, answers, change)[answers]


def shares(settings: Mapping[str, Any], lengths: Tensor, batch: Tensor) -> Tensor:
    """The part of every token in the mean over a mini-batch.

    Answers of 1 and 3 tokens, both in the micro-batch, `max_new_tokens` 4: ¼ each (ppo, and grpo with `dapo`); ½, then
    ⅙ each (rloo, and grpo with `grpo`); ⅛ each (`dr_grpo`).

    Args:
        settings: `TrainSettings.identity()`.
        lengths: [m] int64, tokens of the answers of a micro-batch.
        batch: int64, those of all answers of its mini-batch.

    Returns:
        [k] float32.
    """
    mean = settings.get("loss_type", "grpo" if settings["stage"] == "rloo" else "dapo")
    if mean == "grpo":
        part = 1.0 / (lengths * len(batch))
    else:
        tokens = batch.sum() if mean == "dapo" else torch.tensor(len(batch) * settings["max_new_tokens"])
        part = torch.full(lengths.shape, 1.0 / float(tokens), device=lengths.device)
    return torch.repeat_interleave(part, lengths)
