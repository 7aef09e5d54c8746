"""From scores to advantages: what each token of an answer earned, and how much more that is than was expected.

One decision: everything here is a plain function of small tensors on the processor, for all answers of a step at once.
So whitening needs no talk between processes, and what a number is can be worked out by hand.

Example for this whole file, one answer `[11, 12, EOS]` in a width of 5, the coefficient of the KL penalty 0.1, its
score 2, γ 1, λ 0.95::

    mask             1      1      1      0      0
    logps           -1     -1     -1      9      9     of the policy that drew it; behind the mask nothing is read
    reference       -1.5   -0.5   -1     -9     -9
    log ratio        0.5   -0.5    0      0      0     k1, whose expectation is the KL divergence
    rewards         -0.05   0.05   2      0      0     - 0.1 x log ratio, and the score on the last real token
    values           0.1    0.2    0.3
    advantages       1.72675 1.765 1.7

Legend: b answers of a step, n tokens of the longest. All float32 but `mask`, bool.

Sources: Schulman et al. 2017 (PPO), arXiv:1707.06347; Schulman et al. 2015 (GAE), arXiv:1506.02438; Ziegler et al.
2019, arXiv:1909.08593, for the penalty per token and its controller; Huang et al. 2024, arXiv:2403.17031, for details.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CONTROLLER_GAIN, CONTROLLER_CLIP = 0.1, 0.2  # K_β and the largest error, of Ziegler et al. 2019, section 2.2
SMALLEST_VARIANCE = 1e-8


def answer_mask(answers: Tensor, stops: frozenset[int]) -> Tensor:
    """Which tokens are the answer's: up to its first terminator, which belongs to it.

    >>> answer_mask(torch.tensor([[11, 12, 2, 2, 7], [5, 6, 7, 8, 9]]), frozenset({2})).int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]

    Args:
        answers: [b, n] int64.
        stops: ids that end an answer.

    Returns:
        [b, n] bool.
    """
    ended = torch.isin(answers, torch.tensor(sorted(stops), dtype=answers.dtype))
    return (ended.cumsum(dim=1) - ended.int()) == 0


def log_ratio(logps: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """[b, n] log π − log π_ref of every token, 0 behind the mask: the estimator k1 of the KL divergence.

    Source of the names k1 and k3: Schulman 2020, "Approximating KL divergence".
    """
    return torch.where(mask, logps - reference, 0.0)


def k3(ratio: Tensor) -> Tensor:
    """exp(−r) − 1 + r of log ratios r of any shape: the estimator of the same divergence that is never negative.

    Log ratios 0.5, −0.5, 0 have the mean 0.085084.
    """
    return torch.expm1(-ratio) + ratio


def token_rewards(ratio: Tensor, mask: Tensor, scores: Tensor, kl_coef: float) -> Tensor:
    """The reward of every token: the KL penalty, and on the answer's last real token its score.

    Args:
        ratio: [b, n] what `log_ratio` made.
        mask: [b, n].
        scores: [b].
        kl_coef: β, the coefficient of the penalty.

    Returns:
        [b, n], 0 behind the mask.
    """
    rewards = torch.where(mask, -kl_coef * ratio, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


def advantages_of(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates: A_t = δ_t + γ λ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t, V = 0 at the end.

    Args:
        rewards: [b, n].
        values: [b, n] of the state in which the token was drawn.
        mask: [b, n].
        gamma, lam: γ and λ.

    Returns:
        [b, n], 0 behind the mask. The returns that values are trained on are advantages + values.

    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    values = torch.where(mask, values, 0.0)
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_values = torch.zeros_like(following)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0.0)
        advantages[:, t], next_values = following, values[:, t]
    return advantages


def whiten(values: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """Scale to variance 1 over the real tokens, and shift to mean 0.

    Args:
        values: [b, n].
        mask: [b, n].
        shift: False keeps the mean: of rewards, whose sign means something.

    Returns:
        [b, n], 0 behind the mask. One token alone has no variance and is only shifted.
    """
    real = values[mask]
    if len(real) < 2:
        scaled = values - real.mean() if shift else values
    else:
        variance, mean = torch.var_mean(real)
        scaled = (values - mean) * torch.rsqrt(variance + SMALLEST_VARIANCE) + (0.0 if shift else mean)
    return torch.where(mask, scaled, 0.0)


def next_coefficient(kl_coef: float, kl: float, target: float | None) -> float:
    """The coefficient of the penalty behind a step whose answers had a mean KL of `kl` nats.

    β ← β (1 + K_β e) with e = kl / target − 1, at least −0.2 and at most 0.2; without a target it stays.

    >>> round(next_coefficient(0.1, 9.0, 6.0), 6), next_coefficient(0.1, 9.0, None)
    (0.102, 0.1)

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    if target is None:
        return kl_coef
    error = min(max(kl / target - 1, -CONTROLLER_CLIP), CONTROLLER_CLIP)
    return kl_coef * (1 + CONTROLLER_GAIN * error)


@dataclass
class RunningScores:
    """Mean and spread of all scores of the run so far; scores are shifted and scaled by them.

    Source of the merging of two parts: Chan, Golub and LeVeque 1979, "Updating formulae", eq. 2.1.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances to the mean."""

    def add(self, scores: Tensor) -> None:
        """Take in the scores of a step, [b]."""
        values = scores.double()
        count, mean = len(values), float(values.mean())
        squares, total = float(((values - mean) ** 2).sum()), self.count + count
        away = mean - self.mean
        self.squares += squares + away**2 * self.count * count / total
        self.mean += away * count / total
        self.count = total

    def normalised(self, scores: Tensor) -> Tensor:
        """[b] scores less the mean, by the standard deviation; by 1 as long as all scores were equal."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return (scores - self.mean) / (deviation or 1.0)
