"""A checkpoint folder that a person names: what must be in it, checked before anything starts and without torch.

One decision: what was trained to its end is started from, what was interrupted is resumed. A folder without Trainer's
own state is a finished model, and is refused with the setting that starts from it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from tasks.train.checkpoints import MARKER, damage, missing_files, required_files, step_of

STATE = "trainer_state.json"
LINES = "metrics.jsonl"  # the line of every step so far, in our own checkpoints
WHERE = "resume_from_checkpoint"
GIVEN, GIVEN_WEIGHTS = "checkpoint", "checkpoint_weights"  # inputs of training, which tell the program what to take
REWARD_MODEL, REWARD_ADAPTER = "reward_model", "reward_adapter"  # the same where answers are drawn
ADAPTER, MODEL = "adapter_model.safetensors", ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json", "adapter_config.json", "config.json", "base.json")
STATE_FILES = (
    *(STATE, LINES, "optimizer.pt", "optimizer.bin", "pytorch_model_fsdp.bin", "scheduler.pt", "rng_state*.pth"),
)
WORDS = {"optimizer.pt": "the optimizer", "optimizer.bin": "the optimizer", "scheduler.pt": "the schedule"}
ONLY_WEIGHTS = "or set resume: weights_only, which takes the weights and begins at step 0"


def read_step(folder: Path, where: str = WHERE) -> int:
    """The steps that a checkpoint has behind it.

    Raises:
        InputError: its trainer_state.json does not say.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step = state["global_step"]
        if type(step) is int and step >= 0:
            return step
        reason = f"global_step is {step!r}"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise InputError(Problem(where, f"{folder / STATE} does not say its step ({reason})", "Use another checkpoint."))


def require_checkpoint(folder: Path, settings: dict[str, Any], exact: bool, ranks: Collection[int], where: str) -> None:
    """Refuse a folder that training cannot go on from.

    Args:
        folder: as a person named it.
        settings: `TrainSettings.identity()`.
        exact: optimizer, schedule and random states are needed as well as the weights.
        ranks: the processes of this machine.
        where: the key of the recipe, for the error.

    Raises:
        InputError: what is missing, and the cure.
    """
    if not folder.is_dir():
        raise InputError(Problem(where, f"{folder} is not a folder", "Check the path."))
    adapter = settings["finetuning_type"] == "lora"
    found = [*_kind_problems(folder, adapter)] or ([*_state_problems(folder, settings, ranks)] if exact else [])
    if found:
        raise InputError([Problem(where, rule, cure) for rule, cure in found])
    step, most = read_step(folder, where), settings.get("max_steps")
    if exact and most is not None and step >= most:
        raise InputError(Problem(where, *nothing_left(folder, step, f"max_steps is {most}")))


def nothing_left(folder: Path, step: int, total: str) -> tuple[str, str]:
    """The rule and the cure for a checkpoint behind which nothing is to be done."""
    rule = f"{folder} has {step} steps behind it, and {total}: nothing is left to do"
    return rule, f"Raise max_steps or num_train_epochs, {ONLY_WEIGHTS}."


def _kind_problems(folder: Path, adapter: bool) -> list[tuple[str, str]]:
    """Not a checkpoint at all, or one of another kind."""
    names = {path.name for path in folder.iterdir()}
    has_adapter, has_model = ADAPTER in names, not names.isdisjoint(MODEL)
    inside = sorted((step_of(path) or 0, path.name) for path in folder.iterdir() if step_of(path) is not None)
    if inside and STATE not in names:
        return [
            (f"{folder} holds {', '.join(name for _, name in inside)}", f"Name one of them: {folder / inside[-1][1]}.")
        ]
    if not (has_adapter or has_model):
        pickled = sorted(names & set(PICKLED))
        if pickled:
            rule = f"{folder} has its weights in {pickled[0]}, which can run code when it is read"
            return [(rule, "Save it as safetensors, then use that.")]
        return [(f"{folder} has no weights ({ADAPTER} or {MODEL[0]})", "Name a folder checkpoint-N.")]
    if STATE not in names:
        setting = "adapter_name_or_path" if has_adapter else "model_name_or_path"
        kind = "adapter" if has_adapter else "model"
        rule = f"{folder} is a finished {kind}: it has no {STATE}, so there is nothing to resume"
        return [(rule, f"To start from it, set {setting} instead of resume_from_checkpoint.")]
    if adapter != has_adapter:
        rule = f"{folder} holds {'an adapter' if has_adapter else 'a whole model'}, finetuning_type "
        rule += "lora trains an adapter" if adapter else "full and freeze train a whole model"
        return [(rule, "Use the finetuning_type that the checkpoint was made with.")]
    return []


def _state_problems(folder: Path, settings: dict[str, Any], ranks: Collection[int]) -> list[tuple[str, str]]:
    """What an exact resume lacks."""
    processes = settings["nproc_per_node"] * settings.get("nnodes", 1)
    required = required_files(ranks, processes, "fsdp" if settings.get("fsdp") else None)
    missing = missing_files([path.name for path in folder.iterdir()], required)
    made_by = len(list(folder.glob("rng_state_*.pth"))) or int((folder / "rng_state.pth").is_file())
    found = []
    if made_by and settings.get("nnodes", 1) == 1 and made_by != processes:
        rule = f"{folder} was written by {_processes(made_by)}, this run has {processes}"
        found.append((rule, f"Set nproc_per_node: {made_by}, {ONLY_WEIGHTS}."))
        missing = [name for name in missing if not name.startswith("rng_state")]
    if missing:
        named = ", ".join(f"{name} ({WORDS.get(name, 'the random states')})" for name in missing)
        rule = f"{folder} lacks {named}, without which no resume is exact"
        found.append((rule, f"Use a checkpoint that was saved with them, {ONLY_WEIGHTS}."))
    if not found and (folder / MARKER).is_file():
        reason = damage(folder, required)
        if reason:
            found.append((f"{folder} is damaged: {reason}", "Use another checkpoint, or copy it again."))
    return found


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
