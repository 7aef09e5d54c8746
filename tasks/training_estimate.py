"""What a training step goes through, before it runs: sequences, tokens, steps, and memory of a device.

One decision: `plan` and the training program ask the same function, so what was estimated and what was measured are
about the same thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from registry.combinations import ONLINE
from tasks.architecture import LIKE_LLAMA, Architecture, read_architecture
from tasks.batch_plan import BatchPlan
from tasks.devices import cuda_devices
from tasks.estimate import GIB, LargestBatch, Memory, estimate_memory
from tasks.online_estimate import Judges, estimate_drawing
from tasks.program import Spec
from tasks.sequences import IGNORED, TokenizedSequences, common
from tasks.steps import Ready, Step
from tasks.train.given import REWARD_ADAPTER, REWARD_MODEL

MEMORY_FILE = "report/memory.json"  # of a train artifact: what was estimated and what was measured
MEASURED = (
    *("tokens_per_second", "trained_tokens_per_second", "samples_per_second", "peak_memory_gib", "mfu"),
    *("rollout_tokens_per_second", "update_tokens_per_second"),
)
"""Of a step's line: what another machine, or the next time, has otherwise."""
LOOKED_AT = 64  # of the longest sequences: the most trained one of them stands for the largest batch


@dataclass(frozen=True)
class Estimate:
    """What is known of a training step."""

    sequences: int | None
    """Of one epoch; None: not before they are tokenized."""
    tokens: int | None
    """Of one epoch."""
    steps: int | None
    """Optimizer steps of the run; early stopping can make them fewer."""
    memory: Memory | None
    """Of each device; None: not before the model is there, or nothing is known of its kind."""
    at_most: bool
    """The rows are not known yet: every one is taken to be as long as may be, and trained whole."""
    processes: int
    """Devices that train; on CPU, processes that share the memory of the machine."""

    def as_json(self) -> dict[str, Any]:
        """Plain values; sizes in GiB."""
        memory = self.memory.as_json() if self.memory else None
        counts = {"sequences": self.sequences, "tokens": self.tokens, "steps": self.steps}
        return counts | {"memory_gib": memory, "at_most": self.at_most, "devices": self.processes}

    def sentence(self) -> str:
        """For people."""
        if self.sequences is None:
            counts = "sequences and tokens known after tokenize"
            counts += f", {self.steps:,} steps" if self.steps else ""
        else:
            counts = f"{self.sequences:,} sequences, {self.tokens:,} tokens, {self.steps:,} steps"
        if self.memory is None:
            return f"{counts}; memory known when the model is there"
        size = {name: f"{value / GIB:.2f}" for name, value in vars(self.memory).items()}
        bound = "at most " if self.at_most else ""
        return (
            f"{counts}; memory per device {bound}{size['total']} GiB (weights {size['weights']}, "
            f"gradients {size['gradients']}, optimizer {size['optimizer']}, activations and logits "
            f"{size['activations']}"
            + (f", overhead of the process {size['overhead']})" if self.memory.overhead else ")")
        )


def estimate_training(
    settings: Mapping[str, Any],
    model: Architecture | None,
    shards: Path | None,
    packing: bool,
    cutoff_len: int,
    checkpointing: bool,
    micro_batch: int | None = None,
    other_reference: bool = False,
    cuda: bool = False,
    judges: Judges | None = None,
) -> Estimate:
    """Estimate a training step.

    Args:
        settings: `TrainSettings.identity()`, with `nnodes` where there are several machines.
        model: its base; None: not here yet.
        shards: the tokenize artifact; None: not made yet.
        packing: several rows are put into a sequence.
        cutoff_len: longest row, in tokens.
        checkpointing: `gradient_checkpointing`.
        micro_batch: sequences of a forward pass, where memory ran out before with as many as the settings say.
        other_reference: the model to stay close to is another one than the base.
        cuda: it trains on GPUs.
        judges: who is there beside policy and reference where answers are drawn; None: that is not known yet.
    """
    per_device = micro_batch or settings["per_device_train_batch_size"]
    processes = settings["nproc_per_node"] * settings.get("nnodes", 1)
    accumulation = settings["gradient_accumulation_steps"] * settings["per_device_train_batch_size"] // per_device
    drawing = settings["stage"] in ONLINE
    texts = per_device * (2 if settings["stage"] in ("rm", "dpo", "orpo") else 1)
    sequences = tokens = None
    steps, begins = settings.get("max_steps"), 0
    if shards is None:
        batch = LargestBatch(texts, cutoff_len, texts * cutoff_len, packing or texts > 1)
    else:
        data = TokenizedSequences(shards)
        sequences, tokens = len(data), int(data.sizes.sum())
        plan = BatchPlan.of(settings, sequences, per_device, processes)
        steps = plan.total_steps(steps, settings.get("num_train_epochs"))
        batch = largest_batch(data, texts, per_device, packing)
        begins = shared_beginning(data) if drawing and model and model.family in LIKE_LLAMA else 0
    if settings["flash_attn"] == "fa2":
        batch = LargestBatch(batch.texts, batch.longest, batch.trained, masked=False)
    memory = None
    if model and judges:
        memory = estimate_drawing(model, dict(settings), batch, begins, judges, checkpointing, other_reference, cuda)
    elif model and not drawing:
        memory = estimate_memory(model, dict(settings), batch, accumulation, checkpointing, other_reference, cuda)
    return Estimate(sequences, tokens, steps, memory, shards is None, processes)


def estimate_step(step: Step, base: Path | None, shards: Path | None, reward: Path | None) -> Estimate:
    """The estimate of a training step on this machine.

    Args:
        step: the training step.
        base: folder of a model with the shapes of its base; None: not here yet.
        shards: the tokenize artifact; None: not made yet.
        reward: folder of a model with the shapes of its reward model, where that is a model of its own.
    """
    source, settings = step.inputs["shards"].source, step.identity["train"]
    assert isinstance(source, Step)
    return estimate_training(
        settings,
        read_architecture(base) if base else None,
        shards,
        step.identity["packing"],
        source.identity["cutoff_len"],
        step.runtime["gradient_checkpointing"],
        other_reference="reference" in step.inputs,
        cuda=bool(cuda_devices()) or step.cluster is not None,
        judges=find_judges(settings, set(step.inputs), reward),
    )


def find_judges(settings: Mapping[str, Any], inputs: set[str], reward: Path | None) -> Judges | None:
    """Who is there beside policy and reference; None where no answers are drawn, or the reward model is not here yet.

    Args:
        settings: `TrainSettings.identity()`.
        inputs: names of the step's.
        reward: as for `estimate_step`.
    """
    if settings["stage"] not in ONLINE:
        return None
    critic = settings["stage"] == "ppo"
    if REWARD_MODEL not in inputs:
        return Judges(critic, REWARD_ADAPTER in inputs)
    model = read_architecture(reward) if reward else None
    return Judges(critic, model=model) if model else None


def device_memory(step: Step, ready: Ready) -> float | None:
    """Bytes of each CUDA device that a training takes; None: not known, or it trains on the processors."""
    if not cuda_devices():
        return None
    memory = estimate_step(step, ready.paths["base"], ready.paths["shards"], ready.paths.get(REWARD_MODEL)).memory
    return memory.total if memory else None


def largest_batch(data: TokenizedSequences, texts: int, per_device: int, packing: bool) -> LargestBatch:
    """The largest forward pass that can come: every text as long as the longest, with as many trained tokens as any of
    the longest has."""
    lengths = data.lengths() if packing else data.sizes
    size = len(data)
    longest = numpy.argsort(data.lengths())[-LOOKED_AT:].tolist()
    trained = max((int((data[number].labels != IGNORED).sum()) for number in longest), default=0)
    most = int(lengths.max()) if size else 0
    uneven = texts > 1 and size > 1 and int(lengths.min()) != most
    return LargestBatch(texts, most, per_device * trained, packing or uneven)


def taken(spec: Spec, per_device: int, measured_gib: float, cuda: bool) -> dict[str, Any]:
    """What a run took, beside what was estimated: the content of `MEMORY_FILE`.

    Args:
        spec: of the training program.
        per_device: rows of a forward pass, in the end.
        measured_gib: of the process that took most.
        cuda: it trained on GPUs.
    """
    settings, model = spec.settings["train"], read_architecture(Path(spec.inputs["base"]))
    reward = Path(spec.inputs[REWARD_MODEL]) if REWARD_MODEL in spec.inputs else None
    estimate = estimate_training(
        settings,
        model,
        Path(spec.inputs["shards"]),
        spec.settings["packing"],
        0,
        spec.runtime.get("gradient_checkpointing", False),
        per_device,
        "reference" in spec.inputs,
        cuda,
        find_judges(settings, set(spec.inputs), reward),
    )
    estimated = estimate.memory.as_json() if estimate.memory else None
    return {"device": "cuda" if cuda else "cpu", "estimated_gib": estimated, "measured_gib": measured_gib}


def shared_beginning(data: TokenizedSequences) -> int:
    """Tokens that the longest prompts begin with in common."""
    longest = numpy.argsort(data.lengths())[-LOOKED_AT:].tolist()
    return common([tuple(data[number].input_ids[:-1].tolist()) for number in longest]) if longest else 0


def memory_sentence(artifact: Path) -> str | None:
    """Estimated and measured memory of a finished training, where both are known."""
    path = artifact / MEMORY_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("estimated_gib") is None:
        return None
    return f"memory: {found['estimated_gib']['total']:.2f} GiB estimated, {found['measured_gib']:.2f} GiB measured"
