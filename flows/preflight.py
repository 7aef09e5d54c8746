"""What can be known to go wrong before anything starts: disk, device."""

from __future__ import annotations

from flows.graph import Pipeline
from flows.planning import PlannedStep
from registry.errors import InputError, Problem
from registry.home import Home
from registry.models import MODELS
from tasks.devices import cuda_devices, require_bf16

RESERVE_BYTES = 100_000_000  # databases, logs, data steps


def bytes_needed(pipeline: Pipeline, lines: list[PlannedStep]) -> int:
    """About what the steps that will run write, in bytes; models of unknown size count as nothing."""
    sizes = {
        name: MODELS[stage.settings.model.model_name_or_path].size_bytes
        for name, stage in pipeline.stages.items()
        if stage.settings.model.model_name_or_path in MODELS
    }
    largest = max(sizes.values(), default=0)
    # fetched and converted; checkpoints and result; merged weights
    weights = {"model": 2.0, "train": 1.0, "merge": 1.0}
    needed = sum(weights.get(line.step.kind, 0.0) * largest for line in lines if line.state != "cached")
    return int(needed) + RESERVE_BYTES


def preflight(pipeline: Pipeline, lines: list[PlannedStep], home: Home) -> None:
    """Refuse to start what cannot end.

    Raises:
        InputError: too little disk, bf16 on a device without it.
    """
    problems: list[Problem] = []
    if any(line.state != "cached" for line in lines):
        try:
            home.require_free(bytes_needed(pipeline, lines))
        except InputError as error:
            problems += error.problems
    for name, stage in pipeline.stages.items():
        if stage.settings.train.bf16:
            try:
                require_bf16(cuda_devices(), f"stages.{name}.bf16")
            except InputError as error:
                problems += error.problems
    if problems:
        raise InputError(problems)
