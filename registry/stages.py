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
        ("pt", Stage("text", "Continued pretraining on plain text.", {"packing": True, "overlong": "split"})),
        ("sft", Stage("chat", "Supervised fine-tuning on the answers of conversations.")),
    ],
)

METHODS: Registry[Method] = Registry(
    "finetuning_type",
    lambda: [
        ("lora", Method("adapter", "Low-rank matrices beside frozen weights (Hu et al. 2021, arXiv:2106.09685).")),
        ("full", Method("weights", "All weights.")),
    ],
)
