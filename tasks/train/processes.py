"""What training on several processes needs beside DistributedDataParallel: DeepSpeed, FSDP, several machines.

One decision: a model whose parameters are divided among processes is put together one parameter at a time, on the
processor, in the model's own modules. So whatever saves and checks a whole model does the same for a divided one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from registry.deepspeed import zero_stage
from tasks.program import ProgramError
from tasks.train.checkpoints import required_files, whole

FSDP_CONFIG = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
}


def count_processes(settings: dict[str, Any]) -> int:
    """Processes on all machines.

    Raises:
        ProgramError: `bad_setting` when the program was started another number of times than the settings say.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    nodes = settings.get("nnodes", 1)
    if processes != settings["nproc_per_node"] * nodes:
        raise ProgramError(
            "bad_setting",
            f"nproc_per_node is {settings['nproc_per_node']} on {nodes} machines, "
            f"the program was started {processes} times",
        )
    return processes


def process_arguments(settings: dict[str, Any], cpu: bool) -> dict[str, Any]:
    """The arguments of `TrainingArguments` that say how processes work together.

    Args:
        settings: `TrainSettings.identity()`, with `nnodes` where there are several machines.
        cpu: there is no CUDA device.

    Raises:
        ProgramError: `bad_setting` for FSDP without CUDA.
    """
    deepspeed = settings.get("deepspeed")
    if settings.get("fsdp") and cpu:
        raise ProgramError("bad_setting", "fsdp needs CUDA devices: accelerate has it for no processor. Use deepspeed.")
    if deepspeed and cpu:
        _deepspeed_on_processors()
    several = settings.get("nnodes", 1) > 1
    if deepspeed and several:  # every machine has its own folder, so its first process writes what all of its own need
        deepspeed = deepspeed | {"checkpoint": {"use_node_local_storage": True} | deepspeed.get("checkpoint", {})}
    return {
        "deepspeed": deepspeed,
        "fsdp": bool(settings.get("fsdp")),
        "fsdp_config": dict(FSDP_CONFIG) if settings.get("fsdp") else None,
        "save_on_each_node": several,
        "ddp_backend": "gloo" if cpu and "LOCAL_RANK" in os.environ else None,
        "use_cpu": cpu,
    }


def _deepspeed_on_processors() -> None:
    """Keep DeepSpeed from looking for devices, and from compiling a faster exchange between processes.

    It compiles at the first use of a machine; when that is killed its lock stays, and every later run waits for it.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def required_here(settings: dict[str, Any], processes: int) -> set[str]:
    """What a checkpoint on this machine must hold."""
    first = int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", "0"))
    deepspeed = settings.get("deepspeed")
    keeper = f"zero{zero_stage(deepspeed)}" if deepspeed else "fsdp" if settings.get("fsdp") else None
    return required_files(range(first, first + settings["nproc_per_node"]), processes, keeper)


def newest_common(root: Path, required: set[str]) -> Path | None:
    """The newest checkpoint that is whole on every machine: a kill may have come between their markers."""
    found = whole(root, required)
    if torch.distributed.is_initialized():
        everywhere: list[set[int]] = [set()] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, set(found))
        found = {step: folder for step, folder in found.items() if all(step in steps for steps in everywhere)}
    return next(reversed(found.values()), None)


@contextmanager
def whole_weights(model: Any, keep: bool) -> Iterator[None]:
    """A model with all of its parameters, in the processor's memory, for as long as the context lasts.

    Every process has to enter; a model that is not divided stays as it is.

    Args:
        model: unwrapped.
        keep: whether this process wants the whole; the others only give their parts.
    """
    places = [
        (module, name, value)
        for module in model.modules()
        for name, value in module._parameters.items()
        if value is not None
    ]
    if not any(_is_divided(value) for _, _, value in places):
        yield
        return
    made: dict[int, nn.Parameter] = {}  # a tied parameter is in several places, and stays one
    for _, _, value in places:
        if id(value) in made:
            continue
        with _put_together(value) as together, torch.no_grad():
            kept = together.detach().to("cpu", copy=True) if keep else torch.empty(0)
        made[id(value)] = nn.Parameter(kept, requires_grad=value.requires_grad)
    if keep:
        for module, name, value in places:
            module._parameters[name] = made[id(value)]
    try:
        yield
    finally:
        for module, name, value in places:
            module._parameters[name] = value


def _is_divided(value: Tensor) -> bool:
    return hasattr(value, "ds_id") or hasattr(value, "full_tensor")


@contextmanager
def _put_together(value: Any) -> Iterator[Tensor]:
    """A parameter's whole tensor: of ZeRO-3, of FSDP (a DTensor), or as it is."""
    gathered: AbstractContextManager[Any] = nullcontext()
    if hasattr(value, "ds_id"):
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        gathered = GatheredParameters([value])
    with gathered:
        yield value.full_tensor() if hasattr(value, "full_tensor") else value.data
