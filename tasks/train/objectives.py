"""What each stage minimises over its batches.

One decision: an objective gives sums, by what they are counted in (tokens, pairs, answers), and the trainer divides
each by what the whole optimizer step holds, over all processes. So loss and gradient do not depend on how it is split.

Legend: p pairs or marked answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tasks.sequences import IGNORED
from tasks.train.batches import Batch
from tasks.train.compared import collate_marked, collate_pairs
from tasks.train.likelihood import sequence_logps, token_loss
from tasks.train.losses import Pairs, bradley_terry, kto, odds_ratio, off_centre, pair_loss
from tasks.train.reference import Reference, unwrapped
from tasks.train.reward import answer_scores

TOKENS, PAIRS, ANSWERS = "tokens", "pairs", "answers"
Gather = Callable[[Tensor], Tensor]


@dataclass
class Sums:
    """What one forward pass gives: sums, by what they are counted in."""

    loss: dict[str, Tensor]
    """Unit → sum of the loss over its units; scalars, differentiated."""
    metrics: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    """Name → unit and sum, for people; not differentiated."""


class TokenLikelihood:
    """pt and sft: the negative log-likelihood of the trained tokens."""

    pieces = 1

    def counts(self, batch: Batch) -> dict[str, int]:
        """Units in a batch."""
        return {TOKENS: trained_tokens(batch)}

    def prepare(self, model: Any, batches: list[dict[str, Any]], gather: Gather) -> None:
        """Nothing is needed of the whole step."""

    def sums(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """The loss of one micro-batch."""
        return Sums({TOKENS: token_loss(model, inputs)})


class PairPreference:
    """dpo and orpo: two answers to one prompt, the first one preferred.

    Args:
        settings: `TrainSettings.identity()`.
        reference: log-probabilities of the frozen reference; None for losses without one.
    """

    pieces = 2

    def __init__(self, settings: dict[str, Any], reference: Reference | None) -> None:
        self.settings, self.reference = settings, reference
        # orpo's likelihood of the preferred answer has the weight 1, its odds ratio the weight beta
        self.likelihood_weight = 1.0 if settings["stage"] == "orpo" else settings["pref_ftx"]

    def counts(self, batch: Batch) -> dict[str, int]:
        """Units in a batch: pairs, and trained tokens of the preferred answers."""
        pairs = len(batch.inputs["real"])
        labels = batch.inputs["labels"][:pairs, 1:]
        return {PAIRS: int(batch.inputs["real"].sum()), TOKENS: int((labels != IGNORED).sum())}

    def prepare(self, model: Any, batches: list[dict[str, Any]], gather: Gather) -> None:
        """Nothing is needed of the whole step."""

    def sums(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """The loss of one micro-batch, and what its rewards are."""
        arguments, real = _split(inputs)
        sums, lengths = sequence_logps(model, arguments)
        chosen, rejected = sums.chunk(2)
        sizes = lengths.chunk(2)
        if self.settings["stage"] == "orpo":
            means = chosen / sizes[0].clamp(min=1), rejected / sizes[1].clamp(min=1)
            losses = self.settings["pref_beta"] * odds_ratio(*means)
            rewards = tuple(self.settings["pref_beta"] * mean.detach() for mean in means)
        else:
            pairs = self._pairs(arguments, chosen, rejected, sizes)
            losses = pair_loss(self.settings, pairs)
            rewards = self._rewards(pairs)
        loss = {PAIRS: (losses * real).sum()}
        if self.likelihood_weight:
            loss[TOKENS] = -self.likelihood_weight * (chosen * real).sum()
        logps = {"logps/chosen": chosen.detach(), "logps/rejected": rejected.detach()}
        return Sums(loss, _reward_metrics(rewards[0], rewards[1], real) | _summed(logps, real))

    def _pairs(self, arguments: dict[str, Any], chosen: Tensor, rejected: Tensor, sizes: tuple[Tensor, ...]) -> Pairs:
        if self.reference is None:
            return Pairs(chosen, rejected, sizes[0], sizes[1])
        before, _ = self.reference(partial(sequence_logps, inputs=arguments))
        chosen_before, rejected_before = before.chunk(2)
        return Pairs(chosen - chosen_before, rejected - rejected_before, sizes[0], sizes[1])

    def _rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The implicit rewards, [p] each: β log-ratio, or with simpo β times the mean log-probability."""
        beta = self.settings["pref_beta"]
        if self.reference is not None:
            return beta * pairs.chosen.detach(), beta * pairs.rejected.detach()
        sizes = pairs.chosen_tokens.clamp(min=1), pairs.rejected_tokens.clamp(min=1)
        return beta * pairs.chosen.detach() / sizes[0], beta * pairs.rejected.detach() / sizes[1]


class MarkedAnswers:
    """kto: answers marked as good or bad.

    The distance to the reference is estimated over the whole optimizer step before its first backward pass, from every
    prompt with another row's answer, and is the same for all of its micro-batches and processes.

    Args:
        settings: `TrainSettings.identity()`.
        reference: log-probabilities of the frozen reference.
    """

    pieces = 1

    def __init__(self, settings: dict[str, Any], reference: Reference) -> None:
        self.settings, self.reference = settings, reference
        self.kl = torch.tensor(0.0)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Units in a batch: answers, of them the good and the bad ones, and trained tokens of the good ones."""
        real, good = batch.inputs["real"] > 0, batch.inputs["good"]
        tokens = (batch.inputs["labels"][:, 1:] != IGNORED).sum(dim=1)
        counts = {ANSWERS: real, "good": real & good, "bad": real & ~good, TOKENS: tokens * (real & good)}
        return {unit: int(value.sum()) for unit, value in counts.items()}

    @torch.no_grad()
    def prepare(self, model: Any, batches: list[dict[str, Any]], gather: Gather) -> None:
        """Estimate the distance: the mean log-ratio of answers to prompts that are not theirs, at least 0."""
        total = torch.zeros(2, dtype=torch.float64, device=unwrapped(model).device)
        for batch in batches:
            other = {name: _to(value, total.device) for name, value in batch["other"].items()}
            ratio = sequence_logps(unwrapped(model), other)[0]
            ratio = ratio - self.reference(partial(sequence_logps, inputs=other))[0]
            real = batch["real"].to(total.device)
            total += torch.stack([(ratio * real).sum(), real.sum()]).double()
        total = gather(total[None]).sum(dim=0)
        self.kl = (total[0] / total[1].clamp(min=1)).clamp(min=0).float()

    def sums(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """The loss of one micro-batch, and what its rewards are."""
        arguments, real = _split(inputs)
        good, settings = inputs["good"], self.settings
        logps, _ = sequence_logps(model, arguments)
        ratio = logps - self.reference(partial(sequence_logps, inputs=arguments))[0]
        weights = settings["kto_chosen_weight"], settings["kto_rejected_weight"]
        loss = {ANSWERS: (kto(ratio, good, self.kl, settings["pref_beta"], weights) * real).sum()}
        if settings["pref_ftx"]:
            loss[TOKENS] = -settings["pref_ftx"] * (logps * good * real).sum()
        rewards = settings["pref_beta"] * ratio.detach()
        metrics = {
            "rewards/chosen": ("good", (rewards * good * real).sum()),
            "rewards/rejected": ("bad", (rewards * ~good * real).sum()),
            "kl": (ANSWERS, self.kl * real.sum()),
        }
        return Sums(loss, metrics)


class RewardModelling:
    """rm: a score for an answer, higher for the preferred one.

    Args:
        settings: `TrainSettings.identity()`.
    """

    pieces = 2

    def __init__(self, settings: dict[str, Any]) -> None:
        self.centring = settings.get("center_rewards_coefficient", 0.0)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Units in a batch."""
        return {PAIRS: int(batch.inputs["real"].sum())}

    def prepare(self, model: Any, batches: list[dict[str, Any]], gather: Gather) -> None:
        """Nothing is needed of the whole step."""

    def sums(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """The loss of one micro-batch, and the scores."""
        arguments, real = _split(inputs)
        chosen, rejected = answer_scores(model, arguments).chunk(2)
        losses = bradley_terry(chosen, rejected, inputs["margin"])
        if self.centring:
            losses = losses + self.centring * off_centre(chosen, rejected)
        return Sums({PAIRS: (losses * real).sum()}, _reward_metrics(chosen.detach(), rejected.detach(), real))


Objective = TokenLikelihood | PairPreference | MarkedAnswers | RewardModelling


COLLATES = {"dpo": collate_pairs, "orpo": collate_pairs, "rm": collate_pairs, "kto": collate_marked}
"""Stage → how its rows become a batch, where they are compared."""


def make_objective(settings: dict[str, Any], reference: Reference | None) -> Objective:
    """The objective of a stage.

    Args:
        settings: `TrainSettings.identity()`.
        reference: for stages that have one.
    """
    stage = settings["stage"]
    if stage == "rm":
        return RewardModelling(settings)
    if stage == "kto":
        assert reference is not None
        return MarkedAnswers(settings, reference)
    return PairPreference(settings, reference) if stage in ("dpo", "orpo") else TokenLikelihood()


def trained_tokens(batch: Batch) -> int:
    """Tokens of a batch that are predicted and trained."""
    return int((batch.inputs["labels"][:, 1:] != IGNORED).sum())


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The model's own arguments, and which rows are real, (p,)."""
    own = ("input_ids", "labels", "attention_mask", "use_cache")
    return {name: inputs[name] for name in own}, inputs["real"]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _summed(values: dict[str, Tensor], real: Tensor) -> dict[str, tuple[str, Tensor]]:
    return {name: (PAIRS, (value * real).sum()) for name, value in values.items()}


def _reward_metrics(chosen: Tensor, rejected: Tensor, real: Tensor) -> dict[str, tuple[str, Tensor]]:
    """A pair whose rewards are equal is not counted as right."""
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }
    return _summed(values, real)
