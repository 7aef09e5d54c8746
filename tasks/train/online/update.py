"""Learning from the answers of a step: mini-batches, epochs, gradients.

One decision: every token has its part in the mean over the whole mini-batch, over all processes, before anything is
differentiated. So a mini-batch gives one gradient however it is split.

Legend: k real tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from tasks.program import ProgramError
from tasks.train.online.experience import Experience
from tasks.train.online.inputs import Inputs, make_inputs
from tasks.train.online.losses import BIGGEST, kl_loss, of_answers, policy_loss, shares, value_loss
from tasks.train.online.moved import Moved, Ranks
from tasks.train.online.roles import Judge, Roles
from tasks.train.online.rollout import Sampling
from tasks.train.online.scoring import Held, token_logps

FIRST_RATIO = 1e-3  # of log-probabilities that are asked for twice; here they are equal, other kernels may round


def mini_batches(lengths: list[int], size: int, epoch: int, order: tuple[int, int]) -> Iterator[list[int]]:
    """The answers of each mini-batch of an epoch; in the first epoch in the order of the step.

    Args:
        lengths: tokens of each prompt and answer; those of one mini-batch are sorted by them, so that its micro-batches
            have few pads.
        size: answers of a mini-batch, over all processes.
        epoch: from 0.
        order: seed and step.
    """
    count = len(lengths)
    chosen = numpy.arange(count) if epoch == 0 else numpy.random.default_rng([*order, epoch]).permutation(count)
    for start in range(0, count, size):
        yield sorted((int(index) for index in chosen[start : start + size]), key=lambda index: (lengths[index], index))


def micro_batches(batch: list[int], size: int, index: int, count: int) -> list[list[int]]:
    """Those of a mini-batch that process `index` of `count` does, `size` answers each.

    >>> micro_batches([4, 5, 6, 7, 8], 2, 0, 2)
    [[4, 5], [8]]
    """
    return [batch[start : start + size] for start in range(index * size, len(batch), count * size)]


class Update:
    """Trains the policy, and the critic where there is one, on the answers of a step.

    Args:
        roles: who is trained.
        moved: `policy`, and `critic` where there is one.
        settings: `TrainSettings.identity()`.
        micro_batch: answers of one forward pass.
        ranks: the processes.
    """

    def __init__(
        self, roles: Roles, moved: dict[str, Moved], settings: dict[str, Any], micro_batch: int, ranks: Ranks
    ) -> None:
        self.roles, self.moved, self.settings, self.ranks = roles, moved, settings, ranks
        self.micro_batch = micro_batch
        self.size = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * ranks.count
        self.sampling = Sampling(settings["temperature"], settings["top_k"], settings["top_p"])

    def __call__(self, experience: Experience, step: int, held: Held | None = None) -> dict[str, float]:
        """Make the updates of a step; means of what they were.

        Args:
            experience: what is learned from.
            step: its number.
            held: the pass that the first update need not make again.

        Raises:
            ProgramError: `unexpected` when the policy of the first mini-batch is not the one that drew the answers,
                `not_finite` for a gradient that is no number.
        """
        lengths = [len(item) for item in experience.answers]
        found: list[dict[str, float]] = []
        for epoch in range(self.settings["ppo_epochs"]):
            for batch in mini_batches(lengths, self.size, epoch, (self.settings["seed"], step)):
                logps = held.take() if held is not None and not found else None
                metrics, enough = self._mini_batch(experience, batch, step, not found, logps)
                found.append(metrics)
                if enough:
                    return self._means(found, stopped=True)
        return self._means(found, stopped=False)

    def _means(self, found: list[dict[str, float]], stopped: bool) -> dict[str, float]:
        names = {name for metrics in found for name in metrics}
        having = {name: [metrics[name] for metrics in found if name in metrics] for name in sorted(names)}
        means = {name: math.fsum(values) / len(values) for name, values in having.items()}
        return means | {"updates": len(found) - stopped, "first_ratio": found[0]["ratio"]}

    def _mini_batch(
        self, experience: Experience, batch: list[int], step: int, first: bool, made: Tensor | None = None
    ) -> tuple[dict[str, float], bool]:
        """One update of policy and critic; and whether the policy has gone far enough for this step."""
        lengths = experience.mask[batch].sum(dim=1)
        mine = micro_batches(batch, self.micro_batch, self.ranks.index, self.ranks.count)
        passes = len(micro_batches(batch, self.micro_batch, 0, self.ranks.count))
        metrics = self._policy(experience, mine, passes, lengths, made)
        error = metrics.pop("first_error")
        if first and error > FIRST_RATIO:
            raise ProgramError(
                "unexpected",
                f"step {step}: before its first update the policy gives answers a log-probability that differs by "
                f"{error:.3g} from the one they were drawn with. Please report it.",
            )
        limit = self.settings.get("target_kl")
        if limit is not None and metrics["approx_kl"] > limit and not first:
            self.moved["policy"].forget()
            return {name: metrics[name] for name in ("approx_kl", "ratio")}, True
        metrics["grad_norm"] = self._move("policy", step)
        if self.roles.critic is not None:
            metrics |= self._critic(self.roles.critic, experience, mine, passes, int(lengths.sum()))
            metrics["critic_grad_norm"] = self._move("critic", step)
        return metrics, False

    def _policy(
        self, experience: Experience, mine: list[list[int]], passes: int, batch: Tensor, made: Tensor | None
    ) -> dict[str, float]:
        """Gradients of the policy's loss, and what its ratios are.

        Args:
            experience: of the step.
            mine: the answers of each micro-batch of this process.
            passes: of the process that makes most.
            batch: tokens of each answer of the mini-batch.
            made: [k] log-probabilities of the only micro-batch, where they are there with gradients.
        """
        sums, error, stage = torch.zeros(4, dtype=torch.float64), 0.0, self.settings["stage"]
        for rows in mine:
            before, advantages, reference = self._taken(experience, rows, "logps", "advantages", "reference")
            lengths = experience.mask[rows].sum(dim=1).to(before.device)
            if made is None:
                with self.ranks.autocast():
                    logps = token_logps(self.roles.policy, self._inputs(experience, rows), self.sampling)
            else:
                logps, made = made, None
            change = logps - before
            of_what = of_answers(change, lengths) if stage == "rloo" else change
            losses, clipped = policy_loss(of_what, advantages, self.settings["cliprange"])
            if stage == "grpo":
                losses = losses + experience.kl_coef * kl_loss(change, logps - reference)
            losses = losses * shares(self.settings, lengths, batch)
            losses.sum().backward()
            self.moved["policy"].passed()
            with torch.no_grad():
                ratio = change.clamp(-BIGGEST, BIGGEST).exp()
                values = (losses * batch.sum(), ratio, clipped, ratio - 1 - change)
                sums += torch.stack([value.double().sum().cpu() for value in values])
                error = max(error, float(change.abs().max()))
        self.moved["policy"].finish(passes)
        device = self.roles.policy.device
        total = (self.ranks.sum(sums.to(device)) / int(batch.sum())).tolist()
        found = dict(zip(("policy_loss", "ratio", "clip_fraction", "approx_kl"), total, strict=True))
        return found | {"first_error": float(self.ranks.sum(torch.tensor(error, device=device)))}

    def _critic(
        self, critic: Judge, experience: Experience, mine: list[list[int]], passes: int, tokens: int
    ) -> dict[str, float]:
        """Gradients of the critic's loss."""
        sums = torch.zeros(2, dtype=torch.float64)
        with critic.active():
            for rows in mine:
                inputs = self._inputs(experience, rows)
                before, returns = self._taken(experience, rows, "values", "returns")
                with self.ranks.autocast():
                    values = critic(inputs, inputs.drawn_from())
                losses, clipped = value_loss(values, before, returns, self.settings["cliprange_value"])
                (losses.sum() / tokens).backward()
                self.moved["critic"].passed()
                sums += torch.stack([losses.detach().double().sum().cpu(), clipped.double().sum().cpu()])
        self.moved["critic"].finish(passes)
        total = (self.ranks.sum(sums.to(self.roles.policy.device)) / tokens).tolist()
        return dict(zip(("value_loss", "value_clip_fraction"), total, strict=True))

    def _inputs(self, experience: Experience, rows: list[int]) -> Inputs:
        return make_inputs([experience.answers[row] for row in rows], self.roles.policy.device, self.roles.share)

    def _taken(self, experience: Experience, rows: list[int], *names: str) -> list[Tensor]:
        """[k] of each of the named tensors: the real tokens of some answers."""
        mask, device = experience.mask[rows], self.roles.policy.device
        return [getattr(experience, name)[rows][mask].to(device) for name in names]

    def _move(self, role: str, step: int) -> float:
        """Make a step by the gradients of all processes; their norm."""
        norm = self.moved[role].move(self.settings["max_grad_norm"])
        if not math.isfinite(norm):
            raise ProgramError(
                "not_finite",
                f"the gradient of the {role} is not finite at step {step}. Lower learning_rate or max_grad_norm, or "
                "look at the scores of its answers.",
            )
        return norm
