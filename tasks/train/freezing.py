"""Training some layers of a model, the others frozen.

One decision: names are looked up in the model before anything is trained, and what matches nothing is refused with the
names there are.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from registry.errors import did_you_mean
from tasks.program import ProgramError
from tasks.train.reward import SCORE_HEAD

ALL = "all"
LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder layers.

    Raises:
        ProgramError: `bad_setting` for a model without such a list.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ProgramError("bad_setting", f"finetuning_type freeze: {type(model).__name__} has no list of {count} layers.")


def freeze(model: Any, settings: dict[str, Any]) -> Any:
    """Let some layers be trained: float32 those, the others in bfloat16 with `bf16`.

    Args:
        model: float32.
        settings: `TrainSettings.identity()`.

    Raises:
        ProgramError: `bad_setting` for more layers than there are, or a module that is not there.
    """
    model.requires_grad_(False)
    name, layers = decoder_layers(model)
    wanted = settings["freeze_trainable_layers"]
    if abs(wanted) > len(layers):
        raise ProgramError("bad_setting", f"freeze_trainable_layers is {wanted}, the model has {len(layers)} layers.")
    chosen = list(layers)[-wanted:] if wanted > 0 else list(layers)[:-wanted]
    modules = settings["freeze_trainable_modules"]
    for layer in chosen:
        for part in [layer] if ALL in modules else _find(layer, modules, "freeze_trainable_modules", "a layer"):
            part.requires_grad_(True)
    extra = list(settings["freeze_extra_modules"])
    if settings["stage"] == "rm" and SCORE_HEAD not in extra:
        extra.append(SCORE_HEAD)  # it is new
    for part in _find(model, extra, "freeze_extra_modules", "the model outside its layers", name):
        part.requires_grad_(True)
    if settings["bf16"]:
        for value in model.parameters():
            if not value.requires_grad:
                value.data = value.data.to(torch.bfloat16)
    return model


def _find(root: nn.Module, names: list[str], setting: str, place: str, without: str | None = None) -> list[nn.Module]:
    """The modules with weights below `root` whose names end with one of `names`; none of those below `without`.

    Raises:
        ProgramError: `bad_setting` for a name that matches none.
    """
    modules = {
        name: module
        for name, module in root.named_modules()
        if name and any(True for _ in module.parameters())
        if without is None or not (without == name or f"{name}.".startswith(f"{without}."))
        if without is None or not without.startswith(f"{name}.")
    }
    found = []
    for wanted in names:
        matching = [module for name, module in modules.items() if f".{name}".endswith(f".{wanted}")]
        if not matching:
            known = sorted(modules)
            raise ProgramError(
                "bad_setting",
                f"{setting} {wanted} matches no module of {place}. "
                f"{did_you_mean(wanted, known)} There are: {', '.join(known)}.",
            )
        found += matching
    return found


def trained_parameters(model: nn.Module) -> dict[str, list[int]]:
    """Names of the trained parameters, `*` for the number of a layer → numbers of the layers, sorted."""
    groups: dict[str, list[int]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            number = LAYER_NUMBER.search(name)
            layers = groups.setdefault(LAYER_NUMBER.sub(".*.", name, count=1), [])
            layers += [int(number[1])] if number else []
    return {name: sorted(layers) for name, layers in sorted(groups.items())}
