"""What the training steps of a plan will take, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import Artifact
from tasks.devices import cuda_devices
from tasks.estimate import GIB
from tasks.steps import LocalFolder, Step
from tasks.train.given import REWARD_MODEL
from tasks.training_estimate import Estimate, estimate_step

if TYPE_CHECKING:
    from flows.planning import PlannedStep


def estimate_planned(step: Step, made: Mapping[int, Artifact]) -> Estimate:
    """The estimate of a training step of a plan.

    Args:
        step: the training step.
        made: id of a step → its artifact, of those that are done.
    """
    shards = step.inputs["shards"].source
    reward = _model_folder(step, made, REWARD_MODEL) if REWARD_MODEL in step.inputs else None
    there = made[id(shards)].path if id(shards) in made else None
    return estimate_step(step, _model_folder(step, made), there, reward)


def _model_folder(step: Step, made: Mapping[int, Artifact], name: str = "base") -> Path | None:
    """Where a model that is an input of a step lies; of one that is still to be trained or merged, the one it is made
    of, whose shapes it has."""
    source = step.inputs[name].source
    if isinstance(source, LocalFolder):
        return source.path
    if id(source) in made:
        return made[id(source)].path
    return _model_folder(source, made) if "base" in source.inputs else None


def memory_notes(lines: Sequence[PlannedStep]) -> list[str]:
    """A sentence for each training step whose estimate is more than the device has, with what would make it less.

    On CUDA the memory of the smallest visible device counts, whatever else is on it; without, what is free of this
    machine's, for all processes together.
    """
    notes = []
    for line in lines:
        if line.estimate is None or line.estimate.memory is None or line.step.cluster:  # which has devices of its own
            continue
        settings = line.step.identity["train"]
        needed, there, what = _needed_and_there(line.estimate.memory.total, settings["nproc_per_node"])
        if needed > there:
            bound = "at most" if line.estimate.at_most else "about"
            cures = "; or ".join(_cures(settings, line.step.runtime["gradient_checkpointing"]))
            notes.append(
                f"{line.step.title}: training takes {bound} {needed / GIB:.1f} GiB, {what} {there / GIB:.1f} GiB. "
                f"If memory runs out: {cures}."
            )
    return notes


def _needed_and_there(total: float, processes: int) -> tuple[float, float, str]:
    """Bytes that are needed and bytes that there are, in the same place, and what that is called."""
    devices = cuda_devices()
    if devices:
        smallest = min(devices, key=lambda device: device.memory_mib)
        return total, smallest.memory_mib * 2**20, f"{smallest.name} has"
    import psutil

    return total * processes, psutil.virtual_memory().available, "free here are"


def _cures(settings: Mapping[str, Any], checkpointing: bool) -> list[str]:
    """What takes less memory, of what is not set already."""
    cures = []
    if settings["per_device_train_batch_size"] > 1:
        cures.append("lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor")
    if not checkpointing:
        cures.append("set gradient_checkpointing: true")
    if settings["finetuning_type"] != "lora":
        cures.append("use finetuning_type: lora, with quant_bit: 4 for less still")
    elif "quant_bit" not in settings:
        cures.append("set quant_bit: 4")
    return [*cures, "lower cutoff_len", "use a smaller model"]
