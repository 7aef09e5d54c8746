"""How well a reward model tells the better answer of a pair.

One decision: a pair counts as right when the preferred answer's score is strictly higher; two equal scores tell
nothing. Scores are read where training reads them, at the last trained token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tasks.program import ProgramError
from tasks.scoring import Shards, batches

Pair = tuple[float, float]


def reward_results(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Accuracy and mean margin of many pairs.

    >>> reward_results([(2.0, 1.0), (0.5, 0.5)])["reward_accuracy"]
    {'value': 0.5, 'right': 1, 'rows': 2}

    Args:
        pairs: score of the preferred answer and of the other.

    Returns:
        `reward_accuracy` and `reward_margin`, each with `value` and `rows`.

    Raises:
        ProgramError: `bad_setting` without pairs, `not_finite` for a score that is not a number.
    """
    if not pairs:
        raise ProgramError("bad_setting", "there are no pairs to score")
    if not all(map(math.isfinite, (score for pair in pairs for score in pair))):
        raise ProgramError("not_finite", "a score is not a number: the model is broken.")
    right = sum(chosen > rejected for chosen, rejected in pairs)
    margin = math.fsum(chosen - rejected for chosen, rejected in pairs) / len(pairs)
    return {
        "reward_accuracy": {"value": right / len(pairs), "right": right, "rows": len(pairs)},
        "reward_margin": {"value": margin, "rows": len(pairs)},
    }


def score_pairs(
    model: Any, shards: Shards, batch_size: int, on_batch: Callable[[int, int], None] = lambda done, total: None
) -> list[Pair]:
    """The scores of every pair.

    Args:
        model: with a score head, in evaluation mode.
        shards: of pairs.
        batch_size: most texts per forward pass.
        on_batch: told texts done and texts in all after each batch.
    """
    import torch

    from tasks.train.batches import collate
    from tasks.train.reward import answer_scores

    scores: dict[int, float] = {}
    for batch in batches(shards.lengths, batch_size, 1):
        rows = [{"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]} for ids, labels in shards.take(batch)]
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in collate(rows, packing=False).inputs.items()
        }
        with torch.inference_mode():
            scores |= zip(batch, answer_scores(model, inputs).tolist(), strict=True)
        on_batch(len(scores), len(shards))
    return [(scores[index], scores[index + 1]) for index in range(0, len(shards), 2)]
