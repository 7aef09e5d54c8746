"""Putting a checkpoint back: its weights, every one of them, and a check of all that an exact resume needs.

One decision: nothing is loaded in part. Trainer passes over tensors of other names with a warning, and trains on with
the base's; an optimizer's state brings its own learning rate over the settings'; random states that cannot be set are a
line in the log. Each of these is an error here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from registry.errors import InputError
from registry.optimizers import TORCH
from tasks.artifacts import BASE_RECORD
from tasks.program import ProgramError
from tasks.train.adapters import require_equal, require_tensors
from tasks.train.checkpoints import required_files
from tasks.train.given import ADAPTER, ONLY_WEIGHTS, nothing_left, read_step
from tasks.train.lora import check_base
from tasks.train.reference import ADAPTER as NAME
from tasks.train.reference import unwrapped

SCALES = {"lora_rank": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}


def load_weights(model: Any, folder: Path) -> None:
    """Give a model the weights of a checkpoint.

    Args:
        model: as `build_model` made it, perhaps wrapped.
        folder: an adapter of its form, or a whole model of its architecture, under its own or published names.

    Raises:
        ProgramError: `bad_setting` when one tensor is missing, is too many or has another shape.
    """
    model = unwrapped(model)
    if hasattr(model, "peft_config"):
        _load_adapter(model, folder)
        return
    loaded, report = type(model).from_pretrained(
        folder,
        config=model.config,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported, and refused below with what both are
    )
    others = [f"{name} is {tuple(saved)}, not {tuple(own)}" for name, saved, own in sorted(report["mismatched_keys"])]
    require_equal(folder, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), others)
    model.load_state_dict(loaded.state_dict())


def _load_adapter(model: Any, folder: Path) -> None:
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    now, then = model.peft_config[NAME], LoraConfig.from_pretrained(str(folder))
    differences = [
        f"{name} is {getattr(now, field)}, the checkpoint has {getattr(then, field)}"
        for name, field in SCALES.items()
        if getattr(now, field) != getattr(then, field)
    ]
    if then.rank_pattern or then.alpha_pattern:
        differences.append("the checkpoint has ranks or scales of its own for some modules")
    if differences:
        raise ProgramError("bad_setting", f"{folder}: {'; '.join(differences)}. Set them to the checkpoint's values.")
    require_tensors(model, folder)
    set_peft_model_state_dict(model, load_file(folder / ADAPTER), adapter_name=NAME)


def require_same_base(folder: Path, adapter: bool, base_digest: str, changes: dict[str, Any]) -> str | None:
    """Refuse the checkpoint of an adapter on other base weights, or with other positions.

    Returns:
        What to tell the person: that a checkpoint of another tool does not say what it was made on.

    Raises:
        ProgramError: `bad_setting`.
    """
    if not (folder / BASE_RECORD).is_file():
        if not adapter:
            return None
        return f"{folder} has no {BASE_RECORD}: that its adapter was made on these base weights cannot be checked"
    if not adapter:  # a whole model has its own weights
        return None
    before = check_base(str(folder), base_digest)
    if before != changes:
        raise ProgramError(
            "bad_setting",
            f"{folder} was trained with positions {before or 'as they are'}, these settings make them "
            f"{changes or 'as they are'}. Set rope_scaling and cutoff_len as they were.",
        )
    return None


def require_exact(folder: Path, settings: dict[str, Any], trainer: Any, total: int) -> int:
    """Refuse a given checkpoint that this run cannot go on from exactly.

    Args:
        folder: `tasks.train.given.require_checkpoint` has seen it.
        settings: `TrainSettings.identity()`.
        trainer: of this run, whose training has not begun.
        total: steps of the run.

    Returns:
        The step it was saved behind.

    Raises:
        ProgramError: `bad_setting`.
    """
    try:
        step = read_step(folder)
    except InputError as error:
        raise ProgramError("bad_setting", str(error)) from error
    if step >= total:
        raise ProgramError("bad_setting", ". ".join(nothing_left(folder, step, f"this run has {total}")))
    if settings.get("fsdp"):
        return step  # its optimizer is divided, and accelerate puts it together, without pickle
    if hasattr(trainer.model, "peft_config"):
        load_weights(trainer.model, folder)  # small, and says more about another adapter than its optimizer does
    _require_optimizer(_read(folder / "optimizer.pt"), folder, settings, trainer)
    _read(folder / "scheduler.pt")
    args = trainer.args
    name = next(
        iter(
            required_files([args.process_index], args.world_size)
            - {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
        )
    )
    states = _read(folder / name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lacking = sorted({"python", "numpy", "cpu", device} - set(states))
    if lacking:
        raise ProgramError(
            "bad_setting",
            f"{folder / name} lacks the random states of {', '.join(lacking)}. Go on where the checkpoint was made, "
            f"{ONLY_WEIGHTS}.",
        )
    return step


def _read(path: Path) -> dict[str, Any]:
    """A file of a checkpoint, without running anything that is in it."""
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():  # numpy's arrays, in random states
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ProgramError(
            "bad_setting",
            f"{path} cannot be read as plain tensors and numbers ({type(error).__name__}: {reason}); whatever else is "
            f"in it could run code, and is not read. Use another checkpoint, {ONLY_WEIGHTS}.",
        ) from error
    if not isinstance(values, dict):
        raise ProgramError("bad_setting", f"{path} holds a {type(values).__name__}. Use another checkpoint.")
    return values


def _require_optimizer(state: dict[str, Any], folder: Path, settings: dict[str, Any], trainer: Any) -> None:
    groups = state.get("param_groups", [])
    moved = sum(value.requires_grad for value in trainer.model.parameters())
    known = sum(len(group["params"]) for group in groups)
    if moved != known:
        raise ProgramError(
            "bad_setting",
            f"the optimizer in {folder} moves {known} tensors, this run {moved}. Train what it trained, "
            f"{ONLY_WEIGHTS}.",
        )
    if settings["optim"] in TORCH:  # the others are not made that easily
        make, arguments = trainer.get_optimizer_cls_and_kwargs(trainer.args)
        wanted = make([torch.nn.Parameter(torch.zeros(1))], **arguments).param_groups[0].keys()
        lacking = sorted({name for group in groups for name in wanted - group.keys()})
        if lacking:
            raise ProgramError(
                "bad_setting",
                f"the optimizer in {folder} is another than optim {settings['optim']}: its state has no "
                f"{', '.join(lacking)}. Set optim to what it was made with, {ONLY_WEIGHTS}.",
            )
    rate = settings["learning_rate"]
    rates = {rate} | ({rate * settings["loraplus_lr_ratio"]} if settings.get("loraplus_lr_ratio") else set())
    there = {"learning_rate": {group.get("initial_lr", group["lr"]) for group in groups}}
    there["weight_decay"] = {max(group.get("weight_decay", 0.0) for group in groups)}
    differences = [
        f"{name} is {settings[name]:g}, the checkpoint's is {', '.join(f'{value:g}' for value in sorted(there[name]))}"
        for name, allowed in (("learning_rate", rates), ("weight_decay", {settings["weight_decay"]}))
        if there[name] != allowed
    ]
    if differences:
        raise ProgramError(
            "bad_setting",
            f"{folder}: {'; '.join(differences)}. The optimizer's state keeps what it was made with: set them to that, "
            f"{ONLY_WEIGHTS}.",
        )
