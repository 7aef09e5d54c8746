"""Reading an adapter: all of it, or an error.

One decision: the tensors of the file are compared with those of the model, by name and shape. PEFT loads what it finds
and leaves the rest as it began: a file of which a part is lost would train, merge and answer as if it were whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.program import ProgramError
from tasks.train.checkpoints import saved_shapes
from tasks.train.lora import CLASSIFIER_NAMES, adapter_state, resolve_targets, resolve_whole

Shapes = dict[str, tuple[int, ...]]


def load_adapter(model: Any, folder: str, **how: Any) -> Any:
    """A model with an adapter beside it.

    Args:
        model: the base.
        folder: of the adapter.
        **how: for `PeftModel.from_pretrained`.

    Raises:
        ProgramError: `bad_setting` when the adapter is not whole, or another model's.
    """
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(model, folder, **how)
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        if reason is None:
            raise
        rule = f"{folder} is an adapter of another model ({reason}). Use the model it was trained on."
        raise ProgramError("bad_setting", rule) from error
    require_tensors(wrapped, Path(folder))
    return wrapped


def require_tensors(model: Any, folder: Path) -> None:
    """Compare an adapter's file with the adapter of a PEFT model, tensor by tensor.

    Raises:
        ProgramError: `bad_setting`.
    """
    there = saved_shapes(folder)
    wanted: Shapes = {name: tuple(value.shape) for name, value in adapter_state(model, for_plain_base=False)[0].items()}
    others = [
        f"{name} is {there[name]}, not {wanted[name]}"
        for name in sorted(there.keys() & wanted.keys())
        if there[name] != wanted[name]
    ]
    # PEFT saves the embedding of a base too where it might have changed
    strangers = there.keys() - wanted.keys() - {name for name, _ in model.named_parameters()}
    require_equal(folder, sorted(wanted.keys() - there.keys()), sorted(strangers), others)


def require_equal(folder: Path, missing: list[str], strangers: list[str], others: list[str]) -> None:
    """Refuse weights that are not the model's: names that are missing, too many, or of another shape.

    Raises:
        ProgramError: `bad_setting`.
    """
    found = [
        f"{len(names)} {what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for names, what in ((missing, "missing"), (strangers, "that the model has not"), (others, "of another shape"))
        if names
    ]
    if found:
        raise ProgramError(
            "bad_setting",
            f"{folder} is damaged, or of another model or adapter; of its tensors {'; '.join(found)}. "
            "Use the model_name_or_path, finetuning_type and lora_target it was made with, or copy it again.",
        )


def continue_lora(model: Any, adapter: str, settings: dict[str, Any]) -> Any:
    """Load an adapter to train it on.

    Raises:
        ProgramError: `bad_setting` when it has another rank, scale, form or other modules than `settings` says: those
            are fixed when an adapter is made.
    """
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(adapter)
    whole = resolve_whole(model, [name for name in config.modules_to_save or () if name not in CLASSIFIER_NAMES])
    differences = [
        f"{name} is {asked}, the adapter has {found}"
        for name, asked, found in (
            ("lora_rank", settings["lora_rank"], config.r),
            ("lora_alpha", settings["lora_alpha"], config.lora_alpha),
            (
                "lora_target",
                ", ".join(resolve_targets(model, settings["lora_target"])),
                ", ".join(sorted(config.target_modules)),
            ),
            (
                "additional_target",
                ", ".join(resolve_whole(model, settings["additional_target"])) or "nothing",
                ", ".join(whole) or "nothing",
            ),
            ("use_rslora", settings["use_rslora"], config.use_rslora),
            ("use_dora", settings["use_dora"], config.use_dora),
        )
        if asked != found
    ]
    if differences:
        raise ProgramError(
            "bad_setting",
            f"{'; '.join(differences)}. Set them to the adapter's values, or set create_new_adapter: true.",
        )
    config.lora_dropout = settings["lora_dropout"]
    return load_adapter(model, adapter, config=config, is_trainable=True)
