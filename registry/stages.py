"""Training stages and tuning methods by name."""

from __future__ import annotations

from dataclasses import dataclass

from registry.core import Registry


@dataclass(frozen=True)
class Stage:
    """A training stage: what its rows look like and what it is for."""

    shape: str
    """Shape of its rows, see `registry.data_sources`: `chat`."""
    description: str


@dataclass(frozen=True)
class Method:
    """A tuning method: which weights move."""

    makes: str
    """What comes out of training: `adapter` or `weights`."""
    description: str


STAGES: Registry[Stage] = Registry(
    "stage", lambda: [("sft", Stage("chat", "Supervised fine-tuning on the answers of conversations."))]
)

METHODS: Registry[Method] = Registry(
    "finetuning_type",
    lambda: [
        ("lora", Method("adapter", "Low-rank matrices beside frozen weights (Hu et al. 2021, arXiv:2106.09685).")),
        ("full", Method("weights", "All weights.")),
    ],
)
