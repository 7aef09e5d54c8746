"""What an answer is worth beside others to the same prompt, where no critic says what to expect.

Example: two prompts with three answers each, scores (1, 2, 6) and (4, 4, 4)::

    group          (-0.7559, -0.3780, 1.1339), (0, 0, 0)    less the mean 3, by the deviation 2.6458
    leave one out  (-3, -1.5, 4.5), (0, 0, 0)               less the mean of the other two: 4, 3.5, 1.5

Legend: b answers of a step, those to one prompt behind one another. Float32.

Sources: Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (grpo); Liu et al. 2025, arXiv:2503.20783, for `none`;
Kool et al. 2019 and Ahmadian et al. 2024, arXiv:2402.14740, eq. 8 (rloo).
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_DEVIATION = 1e-4  # added to the spread that scores are divided by


def group_advantages(scores: Tensor, size: int, scale: str) -> Tensor:
    """[b] scores less the mean of their group, by the spread that `scale_rewards` names.

    Args:
        scores: [b].
        size: answers to a prompt.
        scale: `group`, `batch` or `none`.
    """
    groups = scores.view(-1, size)
    away = groups - groups.mean(dim=1, keepdim=True)
    if scale != "none":
        spread = groups.std(dim=1, keepdim=True) if scale == "group" else scores.std()
        away = away / (spread + SMALLEST_DEVIATION)
    return away.view(-1)


def leave_one_out(scores: Tensor, size: int) -> Tensor:
    """[b] scores less the mean of the group's other answers."""
    groups = scores.view(-1, size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (size - 1)
    return (groups - others).view(-1)


def group_metrics(scores: Tensor, size: int) -> dict[str, float]:
    """How much the answers to one prompt differ; where they score alike, nothing is learned from them."""
    spread = scores.view(-1, size).std(dim=1)
    return {
        "group_score_std": float(spread.mean()),
        "equal_groups": float(torch.isclose(spread, 0 * spread).float().mean()),
    }
