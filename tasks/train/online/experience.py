"""The answers of one step, with all that the update needs of them, on every process alike.

One decision: processes share out the drawing and the scoring, then everybody gets everything: a few numbers per token.
So means and whitening are those of the whole step, whatever the number of processes.

Legend: b answers of the step, n tokens of the longest. Float32 on the processor, 0 behind an answer's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.train.online.advantages import RunningScores, advantages_of, k3, log_ratio, token_rewards, whiten
from tasks.train.online.groups import group_advantages, group_metrics, leave_one_out
from tasks.train.online.inputs import Answered
from tasks.train.online.scoring import Scored


@dataclass(frozen=True)
class Experience:
    """What a step learns from."""

    answers: list[Answered]
    mask: Tensor
    """[b, n] bool."""
    logps: Tensor
    """[b, n] of the policy that drew them."""
    reference: Tensor
    """[b, n] log-probabilities of the model that is stayed close to."""
    advantages: Tensor
    """[b, n]."""
    values: Tensor | None
    """[b, n] what the critic expected; None without one, and so `returns`."""
    returns: Tensor | None
    """[b, n] what the critic should have expected."""
    scores: Tensor
    """[b] from all sources, before they are normalised, clipped or fined."""
    kl_coef: float
    """Coefficient of the KL penalty in this step."""
    metrics: dict[str, float]


def rows_of(values: Sequence[Sequence[float]], width: int) -> Tensor:
    """[b, n] lists of unequal length, filled up with 0."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in values])


def learn_from(
    answers: list[Answered],
    scored: list[Scored],
    scores: Tensor,
    settings: dict[str, Any],
    kl_coef: float,
    running: RunningScores,
) -> Experience:
    """From scores to advantages.

    Args:
        answers: of the step.
        scored: what was found of each.
        scores: [b] the sum of what all sources gave.
        settings: `TrainSettings.identity()`.
        kl_coef: coefficient of the KL penalty.
        running: of all scores; takes in these.
    """
    lengths = torch.tensor([len(item.answer) for item in answers])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    logps, reference = (rows_of([getattr(item, name) for item in scored], width) for name in ("logps", "reference"))
    ratio = log_ratio(logps, reference, mask)
    earned = final_scores(scores, torch.tensor([item.stopped for item in answers]), settings, running)
    metrics = {
        "score": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
        "kl": float(ratio.sum(dim=1).mean()),
        "kl_token": float(ratio[mask].mean()),
        "kl_k3": float(k3(ratio[mask]).mean()),
        "kl_coef": kl_coef,
        "entropy": sum(item.entropy for item in scored) / int(mask.sum()),
        "stop_rate": sum(item.stopped for item in answers) / len(answers),
        "answer_tokens": float(lengths.float().mean()),
    }
    # in stage grpo the penalty is part of the loss
    rewards = token_rewards(ratio, mask, earned, 0.0 if settings["stage"] == "grpo" else kl_coef)
    metrics["reward"] = float(rewards.sum(dim=1).mean())
    values = returns = None
    if settings["stage"] == "ppo":
        values = rows_of([item.values or [] for item in scored], width)
        advantages, returns, found = expected(rewards, values, mask, settings)
    else:
        advantages, found = compared(rewards.sum(dim=1), settings)
        advantages = torch.where(mask, advantages[:, None], 0.0)
    metrics |= found
    return Experience(answers, mask, logps, reference, advantages, values, returns, scores, kl_coef, metrics)


def expected(
    rewards: Tensor, values: Tensor, mask: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Advantages over what the critic expected, [b, n], whitened; the returns, [b, n]; and what they are like."""
    whitened = whiten(rewards, mask, shift=False) if settings["ppo_whiten_rewards"] else rewards
    advantages = advantages_of(whitened, values, mask, settings["gamma"], settings["lam"])
    returns = advantages + values
    metrics = {
        "values": float(values[mask].mean()),
        "returns": float(returns[mask].mean()),
        "advantages": float(advantages[mask].mean()),
        "explained_variance": explained_variance(values[mask], returns[mask]),
    }
    return whiten(advantages, mask), returns, metrics


def compared(earned: Tensor, settings: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Advantages over the other answers to the same prompt, [b], from what each answer earned, [b]."""
    size = settings["num_generations"]
    if settings["stage"] == "rloo":
        return leave_one_out(earned, size), group_metrics(earned, size)
    return group_advantages(earned, size, settings["scale_rewards"]), group_metrics(earned, size)


def final_scores(scores: Tensor, stopped: Tensor, settings: dict[str, Any], running: RunningScores) -> Tensor:
    """[b] scores as they are rewarded: normalised, then clipped, then less the penalty of answers without an end."""
    if settings.get("ppo_score_norm"):
        running.add(scores)
        scores = running.normalised(scores)
    if settings.get("score_clip") is not None:
        scores = scores.clamp(-settings["score_clip"], settings["score_clip"])
    if settings.get("missing_eos_penalty") is not None:
        scores = scores - settings["missing_eos_penalty"] * (~stopped).float()
    return scores


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns) over tokens: 1 is a critic that knows, 0 one that knows the mean."""
    variance = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / variance if variance else 0.0
