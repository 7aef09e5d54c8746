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
    state_bytes: float = 8.0
    """What it keeps of every trained weight, in bytes: two float32 numbers of Adam. Of projected gradients an upper
    bound: as if they were not; of factors of a matrix (adafactor) nothing."""


TORCH = {"adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adafactor": 0.0, "sgd": 0.0, "adagrad": 4.0, "rmsprop": 4.0}
"""Those of torch and transformers → bytes they keep of a weight."""
BITSANDBYTES = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2.0),
    "paged_adamw_32bit": 8.0,
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 12.0),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3.0),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1.0),
}
STATE_BYTES = {
    "adamw_torch_4bit": 1.0,
    "adamw_torch_8bit": 2.0,
    "galore_adamw_8bit": 2.0,
    "galore_adafactor": 0.0,
    "grokadamw": 12.0,
}
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
        *((name, Optimizer(state_bytes=size)) for name, size in TORCH.items()),
        *((name, Optimizer("bitsandbytes", state_bytes=size)) for name, size in BITSANDBYTES.items()),
        *(
            (name, Optimizer(pack, None, "lore" in name or "pollo" in name, STATE_BYTES.get(name, 8.0)))
            for name, pack in PACKAGES.items()
        ),
        *((name, Optimizer(refused=reason)) for name, reason in REFUSED.items()),
    ]


OPTIMIZERS: Registry[Optimizer] = Registry("optim", _entries)
