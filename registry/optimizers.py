"""Optimizers by name: which there are, and what they need.

One decision: the names are transformers' and stand here as text, so that a recipe is checked without importing it; a
test compares them with the installed version's. Those that cannot be resumed exactly are refused, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.core import Registry


@dataclass(frozen=True)
class Optimizer:
    """An optimizer."""

    package: str | None = None
    """Python package beside torch that it comes from."""
    refused: str | None = None
    """Why it cannot be used."""
    whole_matrices: bool = False
    """It projects the gradients of whole weight matrices; for LoRA's small ones there is nothing to project."""


TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
BITSANDBYTES = (
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
PACKAGES = {
    "galore_adamw": "galore_torch",
    "galore_adamw_8bit": "galore_torch",
    "galore_adafactor": "galore_torch",
    "apollo_adamw": "apollo_torch",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_anyprecision": "torchdistx",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
}
INSIDE_BACKWARD = "it steps inside the backward pass, so no checkpoint holds its state and no resume is exact"
AVERAGED = "what it trains are not the weights that should be saved, and Trainer does not switch before it saves"
OTHER_DEVICE = "its device is none of those that can be trained on here"
REFUSED = {
    **dict.fromkeys(("lomo", "adalomo", "apollo_adamw_layerwise"), INSIDE_BACKWARD),
    **{f"galore_{name}_layerwise": INSIDE_BACKWARD for name in ("adamw", "adamw_8bit", "adafactor")},
    **{f"schedule_free_{name}": AVERAGED for name in ("radam", "adamw", "sgd")},
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), OTHER_DEVICE),
}


def _entries() -> list[tuple[str, Optimizer]]:
    return [
        *((name, Optimizer()) for name in TORCH),
        *((name, Optimizer("bitsandbytes")) for name in BITSANDBYTES),
        *((name, Optimizer(pack, whole_matrices="lore" in name or "pollo" in name)) for name, pack in PACKAGES.items()),
        *((name, Optimizer(refused=reason)) for name, reason in REFUSED.items()),
    ]


OPTIMIZERS: Registry[Optimizer] = Registry("optim", _entries)
