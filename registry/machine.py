"""Settings that need a device or a package: what a machine lacks for them, without importing either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from registry.optimizers import OPTIMIZERS

FASTEST = "adamw_torch_fused"


def machine_problems(settings: Mapping[str, Any], cuda: bool) -> Iterator[tuple[str, str]]:
    """What this machine cannot do: the rule, beginning with the setting, and the cure.

    Args:
        settings: of training, all of them that have an effect.
        cuda: whether there is a CUDA device.
    """
    if settings["flash_attn"] == "fa2" and not (cuda and find_spec("flash_attn")):
        yield "flash_attn fa2 needs a CUDA device and the package flash-attn", "Use flash_attn: sdpa."
    if settings["enable_liger_kernel"] and not (cuda and find_spec("liger_kernel")):
        yield (
            "enable_liger_kernel: the kernels are written for CUDA devices, and come with the package liger-kernel",
            "Remove it.",
        )
    name = settings["optim"]
    package = OPTIMIZERS[name].package
    if package and find_spec(package) is None:
        yield f"optim {name} needs the package {package}, which is not installed", f"Use optim: {FASTEST}."
    elif package == "bitsandbytes" and not cuda:
        yield f"optim {name} is made for CUDA devices, and there is none", f"Use optim: {FASTEST}."
    if "quant_bit" in settings and find_spec("bitsandbytes") is None:
        yield "quant_bit needs the package bitsandbytes, which is not installed", "Install it."
