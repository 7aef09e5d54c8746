"""Which weights a stage trains, and how."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from registry.record import Names, Record, Steps


class MethodSettings(Record):
    """What is trained."""

    finetuning_type: str = "lora"
    """What is trained: `lora` (low-rank matrices beside frozen weights) or `full` (all weights)."""
    lora_rank: Steps = 8
    """Rank r of the LoRA matrices."""
    lora_alpha: Steps | None = None
    """LoRA scale numerator: updates are scaled by lora_alpha / lora_rank; twice the rank when not set."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the input of the LoRA matrices."""
    lora_target: Names = ("all",)
    """Module names that get LoRA matrices; `all` is every linear module but the output head."""

    def resolved_lora_alpha(self) -> int:
        """`lora_alpha`, or twice the rank."""
        return self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_rank
