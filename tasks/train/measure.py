"""How fast a training is and what memory it takes, measured while it runs.

One decision: nothing here changes a step, and nothing of it gets into what an artifact's digest covers: these numbers
are another machine's the next time.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from registry.peak_flops import BF16_PEAKS
from tasks.architecture import Architecture
from tasks.estimate import GIB
from tasks.operations import step_flops

if TYPE_CHECKING:
    from tasks.train.trainer import StepCounts

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Memory of this process now, in bytes; on CUDA what its tensors take on the device."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most memory this process ever had, in bytes; on CUDA what its tensors took on the device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # not getrusage, which on Linux begins with the peak of the process that started this one
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class StepSpeed:
    """What a step's counts and its time say.

    Args:
        model: the base; None where nothing is known of its kind.
        settings: `TrainSettings.identity()`.
        processes: all of them, a device each.
    """

    def __init__(self, model: Architecture | None, settings: dict[str, Any], processes: int) -> None:
        self.model, self.settings = model, settings
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        # float32 products have another peak, and which one depends on switches of PyTorch
        self.peak = BF16_PEAKS.get(name, 0.0) * processes if settings["bf16"] else 0.0

    def rates(self, counts: StepCounts, seconds: float) -> dict[str, float]:
        """Tokens, trained tokens and samples (rows of the data) per second, over all processes, and `mfu`: the share of
        the devices' peak that the model's own operations are, where that peak is known.

        Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
        """
        seconds = max(seconds, 1e-9)
        rates = {
            "tokens_per_second": round(counts.tokens / seconds, 2),
            "trained_tokens_per_second": round(counts.trained / seconds, 2),
            "samples_per_second": round(counts.samples / seconds, 4),
        }
        if self.peak and self.model:
            flops = step_flops(self.model, self.settings, counts.tokens, counts.trained, counts.squares)
            rates["mfu"] = round(flops / seconds / self.peak, 4)
        return rates


def peak_gib(peak: float) -> float:
    """Bytes as GiB, rounded to 1/1000."""
    return round(peak / GIB, 3)
