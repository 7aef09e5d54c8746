"""What the stages that learn from comparisons minimise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from registry.record import Record, Text

PairLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "simpo",
    "sigmoid_norm",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
"""Losses over pairs: TRL's names, and simpo. Those that compare the pairs of a batch with each other (aot) are not
here: their value depends on how a step is split."""


class LossSettings(Record):
    """Losses of rm, dpo, kto and orpo."""

    pref_loss: PairLoss = "sigmoid"
    """Loss of stage dpo over a pair of answers."""
    pref_beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the preference: the inverse temperature of dpo and kto, the weight of the odds ratio in orpo."""
    pref_ftx: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the likelihood loss on the preferred answers that is added, mean over their tokens."""
    dpo_label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5
    """Margin that simpo wants between the two answers' rewards."""
    kto_chosen_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of answers marked as good."""
    kto_rejected_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of answers marked as bad."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (score of the better answer + score of the other)², added to the loss of rm so that scores stay around
    0; 0.01 is usual (Eisenstein et al. 2023, arXiv:2312.09244)."""
    ref_model: Text | None = None
    """Model to stay close to: an earlier stage, registry name, hub id or folder; nothing means the model that the stage
    starts from."""
