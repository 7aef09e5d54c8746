"""What this machine can do, without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from registry.errors import InputError, Problem

BF16_CAPABILITY = (8, 0)  # NVIDIA Ampere, the first with bfloat16 arithmetic
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # x86 and ARM names in /proc/cpuinfo
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Device:
    """A CUDA device as the driver describes it."""

    uuid: str
    name: str
    capability: tuple[int, int]
    memory_mib: int


@cache
def cuda_devices() -> tuple[Device, ...]:
    """The visible CUDA devices; none where there is no driver.

    Raises:
        RuntimeError: the driver's tool is there and fails.
    """
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ()
    query = ["nvidia-smi", "--query-gpu=uuid,name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if answer.returncode != 0:
        raise RuntimeError(f"nvidia-smi failed: {(answer.stderr or answer.stdout).strip()}")
    return visible(parse_devices(answer.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_devices(text: str) -> tuple[Device, ...]:
    """The devices in nvidia-smi's answer.

    >>> parse_devices("GPU-7a, Tesla T4, 7.5, 15360")
    (Device(uuid='GPU-7a', name='Tesla T4', capability=(7, 5), memory_mib=15360),)
    """
    devices = []
    for line in filter(None, map(str.strip, text.splitlines())):
        uuid, rest = line.split(",", 1)
        name, capability, memory = (part.strip() for part in rest.rsplit(",", 2))
        major, _, minor = capability.partition(".")
        devices.append(Device(uuid.strip(), name, (int(major), int(minor)), int(memory)))
    return tuple(devices)


def visible(devices: tuple[Device, ...], wanted: str | None) -> tuple[Device, ...]:
    """The devices that a program sees.

    Args:
        devices: all of the machine, in the driver's order.
        wanted: CUDA_VISIBLE_DEVICES, numbers or starts of UUIDs; as for CUDA, nothing behind one that there is not.
            A MIG slice is described by the machine's first device.

    >>> one, two = (Device(f"GPU-{n}", "L4", (8, 9), 23034) for n in "ab")
    >>> [device.uuid for device in visible((one, two), "1,7,0")]
    ['GPU-b']
    """
    if wanted is None:
        return devices
    found: list[Device] = []
    for name in map(str.strip, wanted.split(",")):
        if name.isdigit():
            chosen = devices[int(name) : int(name) + 1]
        elif name.startswith("MIG-"):
            chosen = devices[:1]
        else:
            chosen = tuple(device for device in devices if name and device.uuid.startswith(name))[:1]
        if not chosen:
            break
        found += chosen
    return tuple(found)


def require_bf16(devices: tuple[Device, ...], where: str) -> None:
    """Refuse `bf16: true` on a device that has no bfloat16 arithmetic. CPUs always have it, some of them slowly.

    Raises:
        InputError: naming the device and its compute capability.
    """
    for device in devices:
        if device.capability < BF16_CAPABILITY:
            found = ".".join(map(str, device.capability))
            rule = f"bf16 is not possible on {device.name} (compute capability {found}, 8.0 is needed)"
            raise InputError(Problem(where, rule, "Set bf16: false."))


def slow_bf16(cpu_info: str) -> str | None:
    """Why bfloat16 is slow on this processor, or None where it has units for it or says nothing.

    Measured on two cores of a 2.5 GHz Xeon without such units, LoRA on 135 M parameters: 60 tokens/s in bfloat16,
    195 in float32.

    Args:
        cpu_info: text of /proc/cpuinfo.

    >>> slow_bf16("flags : fpu avx2 avx512f amx_bf16")
    """
    flags = {
        flag
        for line in cpu_info.splitlines()
        if line.lower().startswith(("flags", "features"))
        for flag in line.partition(":")[2].split()
    }
    if not flags or flags & BF16_FLAGS:
        return None
    return "this processor has no bfloat16 units, training can take three times as long as with bf16: false"
