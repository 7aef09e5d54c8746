"""LoRA: what is wrapped, what begins as what, and what an adapter file is.

One decision: an adapter that is saved is for the base as it was. An adapter that took its first values out of the base
(`pissa_init`) gives them back when it is saved, by the difference to how it began.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from registry.errors import did_you_mean
from registry.lora_targets import DEFAULT_TARGETS
from registry.method_records import EMBEDDINGS
from tasks.artifacts import BASE_RECORD
from tasks.program import ProgramError
from tasks.train.reference import ADAPTER, REFERENCE_ADAPTER, keep_adapter
from tasks.train.reward import SCORE_HEAD

Note = Callable[[str], None]
ALL, DEFAULT = "all", "default"
PISSA: Any = (
    "pissa_niter_16"  # singular values by 16 rounds of a randomised method, as in LLaMA-Factory: seconds, not hours
)
CLASSIFIER_NAMES = {"classifier", "score"}  # what PEFT adds to modules_to_save of a model with a score head


def say(text: str) -> None:
    """Write a line into the program's log."""
    print(text, flush=True)


def check_base(folder: str, base_digest: str, note: Note = say) -> dict[str, Any]:
    """Refuse an adapter that was made on other base weights.

    Args:
        folder: of the adapter. One of another tool does not say what it was made on; that is noted, and it is taken.
        base_digest: `tasks.artifacts.weights_digest` of the base.
        note: gets what cannot be checked.

    Returns:
        Fields of the base's config that were changed for the adapter, and what they became.

    Raises:
        ProgramError: `bad_setting` with both digests; PEFT would load it on any base of equal shape without a word.
    """
    path = Path(folder) / BASE_RECORD
    if not path.is_file():
        named = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
        name = named.get("base_model_name_or_path") or "one it does not name"
        note(f"an adapter of another tool, for {name}: that its base is this one cannot be checked")
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["base_digest"] != base_digest:
        raise ProgramError(
            "bad_setting",
            f"the adapter was trained on base weights {record['base_digest']}, this base has {base_digest}. "
            "Use the base it was trained on, or train a new adapter.",
        )
    changes: dict[str, Any] = record.get("config", {})
    return changes


def linear_modules(model: Any) -> dict[str, str]:
    """Full name → last part of the name, of every linear module but the output head."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, SCORE_HEAD, None) or model.get_output_embeddings()
    return {
        name: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def resolve_targets(model: Any, asked: list[str]) -> list[str]:
    """The module names LoRA goes to.

    Args:
        model: the base model.
        asked: `["all"]`, `["default"]`, or ends of module names as in `q_proj` or `self_attn.q_proj`.

    Raises:
        ProgramError: `bad_setting` when a name matches no linear module; PEFT only notices when all of them miss.
    """
    modules = linear_modules(model)
    known = sorted(set(modules.values()))
    if ALL in asked:
        return known
    if DEFAULT in asked:
        family = model.config.model_type
        usual = DEFAULT_TARGETS.get(family, ())
        found = sorted(name for name in usual if any(ends_with(module, name) for module in modules))
        if not found:
            raise ProgramError(
                "bad_setting",
                f"lora_target default: nothing is known of the model family {family}. "
                f"Its linear modules: {', '.join(known)}; name some of them, or write all.",
            )
        return found
    unknown = [name for name in asked if not any(ends_with(module, name) for module in modules)]
    if unknown:
        raise ProgramError(
            "bad_setting",
            f"lora_target {', '.join(unknown)} matches no linear module of {type(model).__name__}. "
            f"{did_you_mean(unknown[0], known)} Its linear modules: {', '.join(known)}; or write all.",
        )
    return sorted(asked)


def tied(model: Any) -> bool:
    """Whether the output head is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def resolve_whole(model: Any, asked: list[str]) -> list[str]:
    """Full names of the modules of `additional_target`, trained whole; of a tied model's embedding and head the
    embedding stands for both. PEFT takes ends of names without their dots: `norm` would be `input_layernorm` too.

    Raises:
        ProgramError: `bad_setting` for a name that matches no module with weights, or quantised weights.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    }
    names = set()
    pair = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = next(name for name, module in modules.items() if module is pair[0])
    for wanted in asked:
        matching = {name: m for name, m in modules.items() if ends_with(name, wanted)}
        if wanted == EMBEDDINGS:
            matching = {name: m for name, m in modules.items() if m in pair}
        if not matching:
            known = sorted({name.rpartition(".")[2] for name in modules})
            raise ProgramError(
                "bad_setting",
                f"additional_target {wanted} matches no module of {type(model).__name__}. "
                f"{did_you_mean(wanted, known)} There are: {', '.join(known)}.",
            )
        if any(not value.is_floating_point() for module in matching.values() for value in module.parameters()):
            raise ProgramError(
                "bad_setting", f"additional_target {wanted}: its weights are quantised and cannot be moved. Remove it."
            )
        names |= {embedding if tied(model) and module in pair else name for name, module in matching.items()}
    return sorted(names)


def add_lora(model: Any, settings: dict[str, Any]) -> Any:
    """Put new LoRA matrices, float32, beside the linear modules that `settings` names.

    Raises:
        ProgramError: `bad_setting` for modules that are not there, and for `pissa_init` with a rank too high.
    """
    from peft import LoraConfig, get_peft_model

    whole = resolve_whole(model, settings["additional_target"])
    targets = resolve_targets(model, settings["lora_target"])
    both = [name for name in targets if any(ends_with(other, name) for other in whole)]
    if ALL in settings["lora_target"] or DEFAULT in settings["lora_target"]:
        targets = [name for name in targets if name not in both]
    elif both:
        raise ProgramError("bad_setting", f"{both[0]} is in lora_target and in additional_target. Remove it from one.")
    if settings["pissa_init"]:
        _require_rank(model, targets, settings["lora_rank"])
    config = LoraConfig(
        task_type="SEQ_CLS"
        if settings["stage"] == "rm"
        else "CAUSAL_LM",  # SEQ_CLS trains and saves the score head too
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=targets,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(whole) and tied(model),
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
        init_lora_weights=PISSA if settings["pissa_init"] else True,
    )
    model = get_peft_model(model, config)
    if settings["pissa_init"]:
        config.init_lora_weights = True  # from here on it is an adapter like others, of a base that lacks its values
        keep_adapter(model)
    return model


def _require_rank(model: Any, targets: list[str], rank: int) -> None:
    for name in linear_modules(model):
        if any(ends_with(name, target) for target in targets):
            shape = tuple(model.get_submodule(name).weight.shape)
            if rank > min(shape):
                raise ProgramError(
                    "bad_setting",
                    f"pissa_init: lora_rank {rank} is more than the {min(shape)} singular values of {name} {shape}.",
                )


def adapter_state(model: Any, for_plain_base: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the config of the adapter that is trained.

    Args:
        model: a PEFT model.
        for_plain_base: turn an adapter that began with values of the base into one for the base as it was. With base
            W - s B0 A0, the update s (B A - B0 A0) is s [B | -B0] [A ; A0]: twice the rank at equal scale.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config[ADAPTER])
    if for_plain_base:
        first = get_peft_model_state_dict(model, adapter_name=REFERENCE_ADAPTER, save_embedding_layers=False)
        for name in state:
            if ".lora_A." in name:
                state[name] = torch.cat([state[name], first[name]], dim=0)
            elif ".lora_B." in name:
                state[name] = torch.cat([state[name], -first[name]], dim=1)
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        alpha = scale * 2 * config.r
        config.lora_alpha = int(alpha) if alpha == int(alpha) else alpha
        config.r, config.use_rslora = 2 * config.r, False
    return state, config.to_dict()


def ends_with(module: str, name: str) -> bool:
    """Whether a module is called so: `self_attn.q_proj` is what `model.layers.0.self_attn.q_proj` is called."""
    return module == name or module.endswith(f".{name}")
