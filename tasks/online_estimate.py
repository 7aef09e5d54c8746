"""What a stage that draws answers will take of a device: several roles, and three kinds of passes.

One decision: the parts are those of `tasks.estimate`, put together as the loop goes: answers are drawn with keys and
values kept; then they are scored, where the policy's pass may be kept for its first update; then there are updates, of
the policy and, in stage ppo, of the critic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tasks.architecture import SCORE, Architecture
from tasks.estimate import (
    FIRST_USE,
    HALF,
    SINGLE,
    LargestBatch,
    Memory,
    device_shares,
    kept_and_passing,
    model_weights,
    of_head,
    of_trained,
    overhead,
    reference_weights,
    trained_weights,
    with_files,
)


@dataclass(frozen=True)
class Judges:
    """Who scores and expects beside the policy."""

    critic: bool
    """There is one: stage ppo."""
    adapter: bool = False
    """The reward model is an adapter beside the policy's."""
    model: Architecture | None = None
    """The reward model, where it is a model of its own."""


def estimate_drawing(
    model: Architecture,
    settings: dict[str, Any],
    prompts: LargestBatch,
    common: int,
    judges: Judges,
    checkpointing: bool,
    other_reference: bool = False,
    cuda: bool = False,
) -> Memory:
    """Memory that a stage which draws answers takes on each device at its worst moment.

    Models of their own are counted together: on a GPU a frozen one is there only while it is used, so it can be less.

    Args:
        model: the policy's base, as it is in its files.
        settings: `TrainSettings.identity()`.
        prompts: those of the largest forward pass.
        common: tokens that they all begin with, which are passed once.
        judges: who is there beside policy and reference.
        checkpointing: activations of a layer are computed a second time instead of kept.
        other_reference, cuda: as for `tasks.estimate.estimate_memory`.
    """
    new, batch = settings["max_new_tokens"], _largest(settings, prompts, common)
    trained = trained_weights(model, settings)
    weights = model_weights(model, settings, trained) * device_shares(settings).weights
    weights += _judges(model, settings, judges)
    weights += reference_weights(model, settings, other_reference)
    critic = sum(_judge(model, settings).values()) if judges.critic else 0
    gradients, optimizer = of_trained(sum(trained.values()) + critic, settings)
    kept, passing = kept_and_passing(model, settings, batch, checkpointing)
    holes, mapped = overhead(model, settings, batch, cuda)
    # beside what is kept: the distribution and its entropy, or the reference's logits, or the head's gradient
    learning = kept + max(1.5 * passing.logits, passing.layer) + holes
    # of a tied embedding there is one gradient as the head and one as itself, which are added up before they are sent
    sums = 3 * of_head(model, trained) if model.tied and device_shares(settings).gradients < 1 else 0.0
    drawing = _drawing(model, settings, prompts.longest + new) + (0.0 if cuda else FIRST_USE)
    total = weights + optimizer + max(learning, drawing, gradients + sums + holes)
    total = with_files(total, weights, mapped, settings)
    activations = max(kept + 1.5 * passing.logits, drawing)
    return Memory(weights, gradients, optimizer, activations, holes + mapped, total)


def _largest(settings: dict[str, Any], prompts: LargestBatch, common: int) -> LargestBatch:
    """The largest forward pass: as long answers as may be, behind prompts that are passed once for all of theirs."""
    answers, new = prompts.texts, settings["max_new_tokens"]
    processes = settings["nproc_per_node"] * settings.get("nnodes", 1)
    most = -(-_of_a_step(settings) * processes // settings.get("num_generations", 1))  # prompts of a step
    rest = math.ceil((prompts.longest - common) * min(answers, most) / answers) + new
    return LargestBatch(answers, rest, answers * new, answers > 1 and settings["flash_attn"] != "fa2")


def _of_a_step(settings: dict[str, Any]) -> int:
    """Answers of a step that a process draws."""
    of_a_batch: int = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    return of_a_batch * int(settings["ppo_buffer_size"])


def _judge(model: Architecture, settings: dict[str, Any]) -> dict[str, int]:
    """What is trained of a critic: with LoRA matrices like the policy's and a head, else as much of a model."""
    if settings["finetuning_type"] != "lora":
        return {SCORE: model.hidden} | trained_weights(model.for_scores(), settings)
    matrices = {name: size for name, size in trained_weights(model, settings).items() if name.endswith(".lora")}
    return matrices | {SCORE: model.hidden}


def _judges(model: Architecture, settings: dict[str, Any], judges: Judges) -> float:
    """Bytes of critic and reward model."""
    beside = SINGLE * sum(_judge(model, settings).values())
    found = 0.0
    if judges.critic:
        lora = settings["finetuning_type"] == "lora"
        found += beside if lora else SINGLE * model.for_scores().parameters()
    if judges.adapter:
        found += beside
    if judges.model is not None:
        found += (HALF if settings["bf16"] else SINGLE) * judges.model.for_scores().parameters()
    return found


def _drawing(model: Architecture, settings: dict[str, Any], longest: int) -> float:
    """Bytes while answers are drawn: keys and values, those of a layer once more as it grows, and of the next token the
    logits in three forms and the sums of their probabilities in float64."""
    drawn = settings.get("rollout_batch_size") or _of_a_step(settings)
    size = HALF if settings["bf16"] else SINGLE
    keys = 2 * model.key_value_heads * model.head_dim * size * longest * drawn
    return keys * (model.layers + 1) + (3 * SINGLE + 2 * SINGLE) * drawn * model.vocabulary
