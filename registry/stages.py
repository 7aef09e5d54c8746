"""Training stages and tuning methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from registry.core import Registry


@dataclass(frozen=True)
class Stage:
    """A training stage: what its rows look like and what it is for."""

    shape: str
    """Shape of its rows, see `tasks.formats`: `chat`, `text`, …"""
    description: str
    makes_text: bool = True
    """Whether what comes out is a language model; a reward model is none."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings whose default is another one than that of their field."""


@dataclass(frozen=True)
class Method:
    """A tuning method: which weights move."""

    makes: str
    """What comes out of training: `adapter` or `weights`."""
    description: str


STAGES: Registry[Stage] = Registry(
    "stage",
    lambda: [
        ("pt", Stage("text", "Continued pretraining on plain text.", defaults={"packing": True, "overlong": "split"})),
        ("sft", Stage("chat", "Supervised fine-tuning on the answers of conversations.")),
        (
            "rm",
            Stage("preference", "Reward model: a score for an answer (Ouyang et al. 2022, arXiv:2203.02155).", False),
        ),
        ("dpo", Stage("preference", "Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).")),
        ("kto", Stage("labelled", "Learning from answers marked as good or bad (Ethayarajh 2024, arXiv:2402.01306).")),
        (
            "ppo",
            Stage("prompt", "Proximal policy optimisation of drawn answers (Schulman et al. 2017, arXiv:1707.06347)."),
        ),
        (
            "grpo",
            Stage(
                "prompt",
                "Drawn answers compared within a group: group relative policy optimisation (Shao et al. 2024, "
                "arXiv:2402.03300).",
                defaults={"ppo_epochs": 1},
            ),
        ),
        (
            "rloo",
            Stage(
                "prompt",
                "Drawn answers compared with the others: REINFORCE leave-one-out (Ahmadian et al. 2024, "
                "arXiv:2402.14740).",
                defaults={"ppo_epochs": 1},
            ),
        ),
        ("orpo", Stage("preference", "Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691).")),
    ],
)

METHODS: Registry[Method] = Registry(
    "finetuning_type",
    lambda: [
        ("lora", Method("adapter", "Low-rank matrices beside frozen weights (Hu et al. 2021, arXiv:2106.09685).")),
        ("freeze", Method("weights", "Some decoder layers, the others frozen.")),
        ("full", Method("weights", "All weights.")),
    ],
)
