"""Losses over compared answers, as plain functions of log-probabilities.

One decision: a loss is the sum over a micro-batch, never its mean. The trainer divides by what the whole optimizer step
holds, so a step gives the same gradient however it is split. Everything is computed in float32.

Legend: p pairs. A log-ratio is log π(answer | prompt) − log π_ref(answer | prompt), summed over the answer's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

HIGHEST_MEAN = -1e-7  # of a mean log-probability in log-odds: at 0 the odds are infinite
DISCOPOP_TAU = 0.05  # of the paper


@dataclass(frozen=True)
class Pairs:
    """What the losses of stage dpo are made of; float32, [p] each."""

    chosen: Tensor
    """Log-ratio of the preferred answer; with simpo its log-probability."""
    rejected: Tensor
    """The same of the other answer."""
    chosen_tokens: Tensor
    """Tokens of the preferred answer."""
    rejected_tokens: Tensor
    """Tokens of the other answer."""

    def difference(self) -> Tensor:
        """[p] by how much the preferred answer is ahead."""
        return self.chosen - self.rejected

    def mean_difference(self) -> Tensor:
        """[p] the same per token of each answer."""
        return self.chosen / self.chosen_tokens.clamp(min=1) - self.rejected / self.rejected_tokens.clamp(min=1)


def sigmoid(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """−log σ(β Δ), with a share of pairs taken to be the wrong way round.

    β 0.1 and log-probabilities −10, −12 against the reference's −11, −11.5: Δ = 1 − (−0.5), loss 0.620957.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy labels".
    """
    ahead = beta * pairs.difference()
    return -logsigmoid(ahead) * (1 - smoothing) - logsigmoid(-ahead) * smoothing


def hinge(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """max(0, 1 − β Δ). Source: Zhao et al. 2023 (SLiC), arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657."""
    return relu(1 - beta * pairs.difference())


def ipo(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """(Δ per token − 1 / 2β)². Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; per token as TRL has it."""
    return (pairs.mean_difference() - 1 / (2 * beta)) ** 2


def simpo(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """−log σ(β Δ per token − γ), without a reference. Source: Meng et al. 2024, arXiv:2405.14734, eq. 6."""
    return -logsigmoid(beta * pairs.mean_difference() - gamma)


def sigmoid_norm(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """−log σ(β Δ per token). Source: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, eq. 6."""
    return -logsigmoid(beta * pairs.mean_difference())


def robust(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """Unbiased under flipped labels. Source: Chowdhury et al. 2024, arXiv:2403.00409, eq. 12."""
    ahead = beta * pairs.difference()
    return (-logsigmoid(ahead) * (1 - smoothing) + logsigmoid(-ahead) * smoothing) / (1 - 2 * smoothing)


def exo_pair(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """KL of the model's preference to the smoothed labels. Source: Ji et al. 2024, arXiv:2402.00856, eq. 16."""
    ahead = beta * pairs.difference()
    right = torch.sigmoid(ahead) * (logsigmoid(ahead) - math.log1p(-smoothing))
    return right + torch.sigmoid(-ahead) * (logsigmoid(-ahead) - math.log(smoothing))


def nca_pair(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """Noise contrastive alignment. Source: Chen et al. 2024, arXiv:2402.05369, eq. 14."""
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """A classifier of good and bad, without its moving mean. Source: Jung et al. 2024, arXiv:2404.04656."""
    return -logsigmoid(beta * pairs.chosen) - logsigmoid(-beta * pairs.rejected)


def sppo_hard(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """Squared distance to a win of 1 and of 0. Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7."""
    return (pairs.chosen - 0.5 / beta) ** 2 + (pairs.rejected + 0.5 / beta) ** 2


def apo_zero(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """Up with the preferred, down with the other. Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7."""
    return 1 - torch.sigmoid(beta * pairs.chosen) + torch.sigmoid(beta * pairs.rejected)


def apo_down(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """Down with both, more with the other. Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8."""
    return torch.sigmoid(beta * pairs.chosen) + 1 - torch.sigmoid(beta * pairs.difference())


def discopop(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """Logistic and exponential loss, blended by distance. Source: Lu et al. 2024, arXiv:2406.08414, eq. 5."""
    ahead = beta * pairs.difference()
    blend = torch.sigmoid(ahead / DISCOPOP_TAU)
    return -logsigmoid(ahead) * (1 - blend) + torch.exp(-ahead) * blend


PAIR_LOSSES: dict[str, Callable[[Pairs, float, float, float], Tensor]] = {
    function.__name__: function
    for function in (
        *(sigmoid, hinge, ipo, simpo, sigmoid_norm, robust, exo_pair),
        *(nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, discopop),
    )
}
"""Name → loss of each pair, [p]: of the pairs, β, the label smoothing and γ."""


def log_odds(mean: Tensor) -> Tensor:
    """log(P / (1 − P)) of answers with a mean log-probability log P.

    Means −1e-6 and −0.5 give 13.8155 and 0.43275. Near 0, 1 − P is taken by `expm1`, which keeps the digits that
    `1 - exp` loses.

    Args:
        mean: [p] of any float dtype.

    Returns:
        [p] float32, finite.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 4; Mächler 2012, "Accurately computing log(1 − exp(−|a|))".
    """
    mean = mean.float().clamp(max=HIGHEST_MEAN)
    near = mean > -math.log(2)
    # each branch sees only values that it is finite for: the gradient of the other one would be NaN
    close = torch.log(-torch.expm1(torch.where(near, mean, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, mean)))
    return mean - torch.where(near, close, far)


def odds_ratio(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """[p] −log σ(log odds of the preferred answer − log odds of the other).

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 7.
    """
    return -logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def kto(ratio: Tensor, good: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """1 − v of every answer: λ_D (1 − σ(β (r − z))) where it is good, λ_U (1 − σ(β (z − r))) where it is bad.

    β 0.1, z 0, one good answer with r = 2 and one bad with r = −2, weights 1: both 1 − σ(0.2) = 0.450166.

    Args:
        ratio: [p] log-ratios r.
        good: [p] bool.
        kl: scalar z, the estimate of the distance to the reference; not differentiated.
        beta: inverse temperature.
        weights: λ_D of good and λ_U of bad answers.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    ahead = torch.where(good, ratio - kl, kl - ratio)
    weight = torch.where(good, weights[0], weights[1])
    return weight * (1 - torch.sigmoid(beta * ahead))


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """[p] −log σ(score of the preferred answer − score of the other − margin).

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2.
    """
    return -logsigmoid(chosen.float() - rejected.float() - margin)


def off_centre(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[p] (score of the preferred answer + score of the other)².

    Only the difference of two scores is learnt from a pair, so all of them may drift; this holds them around 0.

    Source: Eisenstein et al. 2023, arXiv:2312.09244, eq. 2.
    """
    return (chosen.float() + rejected.float()) ** 2


def pair_loss(settings: dict[str, Any], pairs: Pairs) -> Tensor:
    """[p] the loss that the settings of a dpo stage name."""
    beta, name = settings["pref_beta"], settings["pref_loss"]
    return PAIR_LOSSES[name](pairs, beta, settings.get("dpo_label_smoothing", 0.0), settings.get("simpo_gamma", 0.0))
