"""How well a reward model tells the better answer of a pair, and whether it looks at more than length.

One decision: a pair counts as right when the preferred answer's score is strictly higher; two equal scores tell
nothing. The rule "the longer answer is better", which a model has to beat, is counted in the same way, with lengths as
scores. Scores are read where training reads them, at the last trained token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy

from registry.errors import InputError, Problem
from tasks.intervals import drawn_sums
from tasks.measurements import Measure, mean, measure
from tasks.program import ProgramError
from tasks.scoring import batches
from tasks.sequences import IGNORED
from tasks.tensor_files import read_headers

CHOSEN_SHORTER, SIMILAR, CHOSEN_LONGER = LENGTHS = ("chosen_shorter", "similar_length", "chosen_longer")
BINS = 10  # of the predicted probability, which goes from 0.5 to 1
HEAD = "score.weight"


class ScoredText(NamedTuple):
    """One answer, scored."""

    score: float
    tokens: int
    """Its trained tokens: those of the answer, or of all answers of a conversation."""


class Texts(Protocol):
    """Tokenized texts: those of shards, or of a list."""

    lengths: list[int]
    """Tokens of each."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of texts, in the order of `indices`."""


Pair = tuple[ScoredText, ScoredText]
"""The preferred answer and the other."""


def reward_results(pairs: Sequence[Pair]) -> dict[str, Measure]:
    """What the scores of many pairs say.

    >>> pairs = [(ScoredText(2.0, 9), ScoredText(1.0, 5)), (ScoredText(0.5, 4), ScoredText(0.5, 8))]
    >>> found = reward_results(pairs)
    >>> found["reward_accuracy"].result
    {'value': 0.5, 'low': 0.0, 'high': 1.0, 'right': 1, 'ties': 1, 'rows': 2}
    >>> found["reward_accuracy_chosen_shorter"].result
    {'value': 0.0, 'low': 0.0, 'high': 0.0, 'right': 0, 'ties': 1, 'rows': 1}

    Returns:
        By name (pairs are drawn): `reward_accuracy` and `reward_margin` (mean), both also of the pairs whose preferred
        answer is shorter, of about the same length or longer (`…_chosen_shorter` …; a name without pairs is left out);
        `longer_is_better_accuracy`; `reward_calibration_error` with its bins; `reward_score`.

    Raises:
        ProgramError: `bad_setting` without pairs, `not_finite` for a score that is not a number.
    """
    results = score_results([text for pair in pairs for text in pair])
    means = numpy.array([(chosen.score + rejected.score) / 2 for chosen, rejected in pairs])
    extremes = {name: results["reward_score"].result[name] for name in ("lowest", "highest")}
    results["reward_score"] = mean(means, **extremes)
    scores = [(chosen.score, rejected.score) for chosen, rejected in pairs]
    for name in ("", *LENGTHS):
        part = [score for score, pair in zip(scores, pairs, strict=True) if name in ("", length_of(pair))]
        if part:
            ending = f"_{name}" if name else ""
            results[f"reward_accuracy{ending}"] = pair_accuracy(part)
            results[f"reward_margin{ending}"] = mean(numpy.array([chosen - rejected for chosen, rejected in part]))
    lengths = [(chosen.tokens, rejected.tokens) for chosen, rejected in pairs]
    results["longer_is_better_accuracy"] = pair_accuracy(lengths)
    results["reward_calibration_error"] = calibration([chosen - rejected for chosen, rejected in scores])
    return results


def score_results(texts: Sequence[ScoredText]) -> dict[str, Measure]:
    """Mean, lowest and highest score of answers.

    Raises:
        ProgramError: `bad_setting` without answers, `not_finite` for a score that is not a number.
    """
    if not texts:
        raise ProgramError("bad_setting", "there are no answers to score")
    scores = [text.score for text in texts]
    if not all(map(math.isfinite, scores)):
        raise ProgramError("not_finite", "a score is not a number: the model is broken.")
    return {"reward_score": mean(numpy.array(scores), lowest=min(scores), highest=max(scores))}


def length_of(pair: Pair) -> str:
    """Which answer of a pair is longer; about the same when the shorter one has nine tenths of the other's tokens.

    >>> [length_of((ScoredText(0.0, tokens), ScoredText(0.0, 10))) for tokens in (8, 9, 11, 12)]
    ['chosen_shorter', 'similar_length', 'similar_length', 'chosen_longer']
    """
    chosen, rejected = (text.tokens for text in pair)
    if 10 * min(chosen, rejected) >= 9 * max(chosen, rejected):
        return SIMILAR
    return CHOSEN_SHORTER if chosen < rejected else CHOSEN_LONGER


def pair_accuracy(scores: Sequence[tuple[float, float]]) -> Measure:
    """The share of pairs whose preferred answer has the higher number, which stands first; with `right` and `ties`."""
    rights = [chosen > rejected for chosen, rejected in scores]
    ties = sum(chosen == rejected for chosen, rejected in scores)
    return mean(numpy.array(rights), right=sum(rights), ties=ties)


def calibration(margins: Sequence[float]) -> Measure:
    """How often the answer with the higher score is the preferred one, beside how often the model says it is.

    A difference d of two scores says that the higher one is preferred with probability σ(|d|). Margins 2, 0.1 and
    −0.1 say 0.8808, 0.5250 and 0.5250; right are 1 of 1 and 1 of 2: the error is (0.1192 + 2 × 0.0250) / 3 = 0.0564.

    Args:
        margins: score of the preferred answer less that of the other.

    Returns:
        The mean over pairs of |share right − mean probability| of their bin; `bins` of 0.05 that hold pairs: `from`,
        `to`, `rows`, `right`, `predicted` (mean).

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    parts: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    off = numpy.zeros((len(margins), BINS))  # by how much a pair is right more often than it was said to be
    for row, margin in enumerate(margins):
        predicted = 1 / (1 + math.exp(-abs(margin)))
        number = min(BINS - 1, int((predicted - 0.5) * 2 * BINS))
        parts[number].append((predicted, margin > 0))
        off[row, number] = (margin > 0) - predicted
    bins = [
        {
            "from": round(0.5 + number / (2 * BINS), 3),
            "to": round(0.5 + (number + 1) / (2 * BINS), 3),
            "rows": len(part),
            "right": sum(right for _, right in part),
            "predicted": math.fsum(predicted for predicted, _ in part) / len(part),
        }
        for number, part in enumerate(parts)
        if part
    ]
    error = math.fsum(abs(each["right"] - each["rows"] * each["predicted"]) for each in bins) / len(margins)
    drawn = numpy.abs(drawn_sums(off)).sum(axis=1) / len(margins)
    return measure(error, drawn, len(margins), bins=bins)


def require_reward_model(folder: Path, where: str) -> None:
    """Refuse a model that gives no score, or several: loaded for scoring, it would get a head of random numbers.

    Args:
        folder: config.json and *.safetensors; only headers are read.
        where: what named it.

    Raises:
        InputError: it is no reward model.
    """
    head = next((tensor for tensor in read_headers(folder) if tensor.name == HEAD), None)
    if head is not None and head.shape[0] == 1:
        return
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["unnamed"]
    gives = f"{head.shape[0]} scores for a text" if head else f"no score, {HEAD} is not among its weights"
    rule = f"the model ({named[0]}) is no reward model: it gives {gives}"
    raise InputError(Problem(where, rule, "Name what a stage of kind rm made."))


def score_texts(
    model: Any, texts: Texts, batch_size: int, on_batch: Callable[[int, int], None] = lambda done, total: None
) -> list[ScoredText]:
    """The score of every text, in their order.

    Args:
        model: with a score head, in evaluation mode.
        texts: of pairs, or of any rows with answers.
        batch_size: most texts per forward pass.
        on_batch: told texts done and texts in all after each batch.
    """
    import torch

    from tasks.train.batches import collate
    from tasks.train.reward import answer_scores

    scored: dict[int, ScoredText] = {}
    for batch in batches(texts.lengths, batch_size, 1):
        rows = [{"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]} for ids, labels in texts.take(batch)]
        tokens = [sum(label != IGNORED for label in row["labels"]) for row in rows]
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in collate(rows, packing=False).inputs.items()
        }
        with torch.inference_mode():
            found = answer_scores(model, inputs).tolist()
        scored |= zip(batch, map(ScoredText, found, tokens), strict=True)
        on_batch(len(scored), len(texts))
    return [scored[index] for index in range(len(texts))]


def paired(texts: Sequence[ScoredText]) -> list[Pair]:
    """Texts of pairs, which follow each other, the preferred one first."""
    return list(zip(texts[::2], texts[1::2], strict=True))
