"""What a training will take of a device's memory, by its parts.

One decision: everything follows from the shapes of the weights, the settings and the largest batch. Nothing is loaded
and nothing is tried, so `plan` can say it before there is anything to run, and the training program measures it.

What is counted of activations is what PyTorch's autograd keeps for the backward pass of a decoder like Llama with our
losses, tensor by tensor; a test compares it with what autograd does keep. Temporary values of one layer are added.

Legend: b texts of a forward pass, s tokens of the longest, n trained positions; h, i, v as in `Architecture`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from registry.combinations import ONLINE, WITH_REFERENCE, WITHOUT_CRITIC
from registry.deepspeed import zero_stage
from registry.optimizers import OPTIMIZERS
from tasks.architecture import LIKE_LLAMA, SCORE, Architecture, layer_of, wrapped

GIB = 2**30
SINGLE, HALF = 4, 2  # bytes of a float32 and of a bfloat16 number
BLOCK = 64  # weights with one scale of their own in 4 bits (QLoRA, arXiv:2305.14314); 256 scales with one of theirs
# measured with glibc 2.36, shares of what the layers keep; of a critic's pass little fits where the policy's was
HOLES = {"lora": 0.93, "full": 0.45, "critic": 0.93, "drawing": 0.62}
FIRST_USE = 0.055 * GIB  # measured: what libraries load and set up at their first product


@dataclass(frozen=True)
class LargestBatch:
    """The largest forward pass of a run."""

    texts: int
    """b: rows, or twice the rows where pairs are compared."""
    longest: int
    """s, in tokens."""
    trained: int
    """n, in tokens: what logits are computed at."""
    masked: bool
    """Rows are packed or padded, so attention needs a mask."""


@dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes."""

    weights: float
    """Of the model, of new matrices, and of a reference model beside it."""
    gradients: float
    optimizer: float
    activations: float
    """What the backward pass needs, and logits."""
    overhead: float
    """On CPU only: what the process holds beside, see `overhead`."""
    total: float
    """At the worst moment; gradients come as activations go, so it can be less than the sum."""

    def as_json(self) -> dict[str, float]:
        """Part → GiB, rounded to 1/1000."""
        return {name: round(value / GIB, 3) for name, value in vars(self).items()}


def trained_weights(model: Architecture, settings: dict[str, Any]) -> dict[str, int]:
    """Name of a weight, or of a module with `.lora`, → numbers of it that are trained.

    Args:
        model: with the head of the stage.
        settings: `TrainSettings.identity()`.
    """
    sizes = {name: math.prod(shape) for name, shape in model.tensors.items()}
    method = settings["finetuning_type"]
    if method == "full":
        return sizes
    if method == "freeze":
        wanted, modules = settings["freeze_trainable_layers"], settings["freeze_trainable_modules"]
        first, last = (model.layers - wanted, model.layers) if wanted > 0 else (0, -wanted)
        inside = {
            name: size
            for name, size in sizes.items()
            if (number := layer_of(name)) is not None and first <= number < last
            if "all" in modules or _is_in(name, modules)
        }
        extra = [*settings["freeze_extra_modules"], *(["score"] if SCORE in sizes else [])]
        return inside | {n: size for n, size in sizes.items() if layer_of(n) is None and _is_in(n, extra)}
    rank = settings["lora_rank"]
    whole = {name: size for name, size in sizes.items() if _is_in(name, settings["additional_target"]) or name == SCORE}
    matrices = {
        f"{name}.lora": rank * sum(shape) + (shape[0] if settings["use_dora"] else 0)
        for name, shape in wrapped(model, settings["lora_target"]).items()
        if f"{name}.weight" not in whole
    }
    return whole | matrices


def _is_in(tensor: str, modules: list[str]) -> bool:
    """Whether a weight is one of a module that is called so."""
    return any(f".{name}." in f".{tensor}" for name in modules)


def estimate_memory(
    model: Architecture,
    settings: dict[str, Any],
    batch: LargestBatch,
    accumulation: int,
    checkpointing: bool,
    other_reference: bool = False,
    cuda: bool = False,
) -> Memory:
    """Memory that a training takes on each device at its worst moment.

    Without quantisation, in float32, on one device, full training with Adam holds 16 bytes per weight: 4 of the weight,
    8 of the optimizer, and 4 of the gradient or, before it is there, activations. LoRA holds 4 per frozen weight and 16
    per trained one.

    Args:
        model: as it is in its files.
        settings: `TrainSettings.identity()`.
        batch: of one process.
        accumulation: forward passes of an optimizer step; with more than one, gradients of the first wait for the
            others.
        checkpointing: activations of a layer are computed a second time instead of kept.
        other_reference: the model to stay close to is another one than the base.
        cuda: of a GPU; else of a process on CPU.

    Not counted: buffers for communication, what CUDA and the libraries take themselves.
    """
    model = model.for_scores() if settings["stage"] == "rm" else model
    trained = trained_weights(model, settings)
    parts = device_shares(settings)
    weights = model_weights(model, settings, trained) * parts.weights
    weights += reference_weights(model, settings, other_reference)
    gradients, optimizer = of_trained(sum(trained.values()), settings)
    kept, passing = kept_and_passing(model, settings, batch, checkpointing)
    ends = of_head(model, trained) * parts.gradients
    waiting = gradients if accumulation > 1 or parts.resident else 0.0
    holes, mapped = overhead(model, settings, batch, cuda)
    # of a tied embedding there is one gradient as the head and one as itself, which are added up to a third
    sums = ((3 if waiting else 2) * ends) if model.tied else 0.0
    unused = kept - passing.head if waiting and not cuda else 0.0  # glibc does not give back what lies between others
    worst = max(
        kept + passing.logits + waiting + holes,  # the loss is computed, nothing has been given back
        kept + max(passing.head, passing.layer) + (waiting or ends) + holes,  # the head's own gradient is there
        gradients + sums + unused + holes,  # the last one is there
    )
    activations = kept + max(passing.logits, passing.head, passing.layer)
    total = with_files(weights + optimizer + worst, weights, mapped, settings)
    return Memory(weights, gradients, optimizer, activations, holes + mapped, total)


def of_trained(count: int, settings: dict[str, Any]) -> tuple[float, float]:
    """Bytes of gradients and of the optimizer's state, on one device, of so many trained weights."""
    parts = device_shares(settings)
    state = OPTIMIZERS[settings["optim"]].state_bytes + parts.master_bytes
    return count * parts.gradient_bytes * parts.gradients, count * state * parts.optimizer


def with_files(total: float, weights: float, mapped: float, settings: dict[str, Any]) -> float:
    """A total in which files that were converted are counted: they are let go when all of them are."""
    if not mapped:
        return total
    return total + mapped if "quant_bit" in settings else max(total, weights + mapped + FIRST_USE)


def overhead(model: Architecture, settings: dict[str, Any], batch: LargestBatch, cuda: bool) -> tuple[float, float]:
    """Bytes that a process on CPU holds beside what is used, and bytes of files that are mapped beside weights.

    glibc asks for aligned memory with some more around it, so what was freed between two kept values is too small for
    the next value of the same size. Measured (docs/training.md): it grows with what a layer keeps, layer by layer, also
    where activations are computed a second time. Weights that are used as they are in their files are not held twice;
    those that are converted are there beside their file for as long as it is open.
    """
    if cuda:
        return 0.0, 0.0
    method = "lora" if settings["finetuning_type"] == "lora" else "full"
    online = "drawing" if settings["stage"] in WITHOUT_CRITIC else "critic"
    holes = HOLES[online if settings["stage"] in ONLINE else method]
    left = FIRST_USE + holes * _kept_by_layer(model, settings, batch) * layers_passed(model, settings)
    held = HALF if settings["bf16"] and settings["finetuning_type"] != "full" else SINGLE
    as_stored = held == model.stored_bytes and "quant_bit" not in settings
    return left, 0.0 if as_stored else float(model.stored_bytes * model.parameters())


@dataclass(frozen=True)
class _Shares:
    """What of each part one device holds, from 0 to 1, and in how many bytes per trained weight."""

    weights: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    gradient_bytes: float = SINGLE
    master_bytes: float = 0.0
    resident: bool = False
    """Gradients stay between steps."""


def device_shares(settings: dict[str, Any]) -> _Shares:
    """How DistributedDataParallel, DeepSpeed (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1) or FSDP divide."""
    processes = settings["nproc_per_node"] * settings.get("nnodes", 1)
    if settings.get("fsdp"):
        return _Shares(1 / processes, 1 / processes, 1 / processes)
    config = settings.get("deepspeed")
    if settings["stage"] in ONLINE:  # without DistributedDataParallel and DeepSpeed, see `tasks.train.online.moved`
        stage = zero_stage(config) if config else 0
        return _Shares(gradients=1 / processes if stage == 2 else 1.0, optimizer=1 / processes if stage else 1.0)
    if config is None:
        # DistributedDataParallel keeps a second copy of every gradient in its buckets
        return _Shares(gradient_bytes=2 * SINGLE, resident=True) if processes > 1 else _Shares()
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    away = {name for name in ("optimizer", "param") if zero.get(f"offload_{name}", {}).get("device", "none") != "none"}
    return _Shares(
        weights=0.0 if "param" in away else 1 / processes if stage == 3 else 1.0,
        gradients=1 / processes if stage >= 2 else 1.0,
        optimizer=0.0 if "optimizer" in away else 1 / processes if stage >= 1 else 1.0,
        gradient_bytes=HALF if settings["bf16"] else SINGLE,
        master_bytes=SINGLE if stage or settings["bf16"] else 0.0,
        resident=True,
    )


def model_weights(model: Architecture, settings: dict[str, Any], trained: dict[str, int]) -> float:
    """Bytes of the model that is trained."""
    frozen = HALF if settings["bf16"] and settings["finetuning_type"] != "full" else SINGLE
    moving = HALF if settings["bf16"] and settings.get("deepspeed") and settings["stage"] not in ONLINE else SINGLE
    held = frozen_weights(model, settings, frozen, trained if settings["finetuning_type"] != "lora" else {})
    copies = 2 if settings.get("pissa_init") else 1  # what the new matrices began as
    moved = sum(size * (copies if name.endswith(".lora") else 1) for name, size in trained.items())
    return held + moving * moved


def frozen_weights(model: Architecture, settings: dict[str, Any], size: int, without: dict[str, int]) -> float:
    """Bytes of frozen weights; linear modules in fewer bits where the settings say so."""
    per_weight = float(size)
    if settings.get("quant_bit") == 4:
        scales = (1 + SINGLE / 256) / BLOCK if settings["double_quantization"] else SINGLE / BLOCK
        per_weight = 0.5 + scales
    elif settings.get("quant_bit") == 8:
        per_weight = 1.0
    linear = {f"{name}.weight" for name in model.linear()}
    return sum(
        math.prod(shape) * (per_weight if name in linear else size)
        for name, shape in model.tensors.items()
        if name not in without
    )


def reference_weights(model: Architecture, settings: dict[str, Any], other: bool) -> float:
    """Bytes of a frozen second model; LoRA's reference is its own base without the matrices."""
    own = settings["finetuning_type"] == "lora" and not other
    if own or not has_reference(settings):
        return 0.0
    return frozen_weights(model, settings, HALF if settings["bf16"] else SINGLE, {})


def has_reference(settings: dict[str, Any]) -> bool:
    """Whether the stage's loss compares with a frozen model."""
    return settings["stage"] in WITH_REFERENCE and settings.get("pref_loss") != "simpo"


def of_head(model: Architecture, trained: dict[str, int]) -> float:
    """Bytes of the output head's gradient, where it is trained: the first one that is there."""
    head = [name for name in trained if layer_of(name) is None and len(model.tensors.get(name, ())) == 2]
    return SINGLE * model.vocabulary * model.hidden if head and SCORE not in trained else 0.0


@dataclass(frozen=True)
class _Passing:
    """Bytes of what is there for a moment only, beside what is kept."""

    logits: float
    """While the loss is computed."""
    head: float
    """While the output head's gradient is."""
    layer: float
    """In the middle of a layer."""


def kept_and_passing(
    model: Architecture, settings: dict[str, Any], batch: LargestBatch, checkpointing: bool
) -> tuple[float, _Passing]:
    """Bytes that are kept for the backward pass, and those that come and go.

    Logits, float32 [n, v]: one log-softmax is kept; while its gradient is computed two more are there. In bfloat16 the
    logits themselves come in both forms.
    """
    tokens = batch.texts * batch.longest
    size, lora = HALF if settings["bf16"] else SINGLE, settings["finetuning_type"] == "lora"
    layers = layers_passed(model, settings)
    per_layer = _kept_by_layer(model, settings, batch)
    logits = SINGLE * batch.trained * model.vocabulary if settings["stage"] != "rm" else 0.0
    stream = SINGLE if not lora or not settings["bf16"] else HALF
    kept = tokens * model.hidden * stream * layers + per_layer if checkpointing else per_layer * layers
    # the last norm and its output; LoRA keeps what goes in, and of the first norm nothing, as nothing moves before it
    kept += logits + (0 if lora else tokens * model.hidden * 3 * SINGLE)
    casts = 0.0
    # autocast keeps a bfloat16 form of every trained matrix until the step's backward pass
    if settings["bf16"] and not writes_out(model, settings):
        trained = trained_weights(model, settings)
        casts = HALF * sum(size for name, size in trained.items() if len(model.tensors.get(name, (1, 1))) == 2)
    width = model.intermediate * (2 if model.gated() else 1)
    return kept + casts, _Passing(2 * logits, logits, tokens * size * (width + model.hidden))


def layers_passed(model: Architecture, settings: dict[str, Any]) -> int:
    """Decoder layers that the backward pass goes through: those from the first one with a trained weight on."""
    if settings["finetuning_type"] != "freeze":
        return model.layers
    trained = trained_weights(model, settings)
    if any(layer_of(name) is None and model.tensors[name][0] == model.vocabulary for name in trained):
        return model.layers
    return model.layers - min((number for name in trained if (number := layer_of(name)) is not None), default=0)


def _kept_by_layer(model: Architecture, settings: dict[str, Any], batch: LargestBatch) -> float:
    """Bytes that autograd keeps of one decoder layer.

    Per token, in numbers of the compute dtype (float32, or bfloat16 with `bf16`), q heads x head_dim, k the same of
    keys:

    * attention: queries q, keys and values 2 k, its result q; with a mask keys and values are repeated to 2 q, and the
      mask has s numbers. A log-sum-exp, float32, per head.
    * MLP: two projections, the activated one and their product, 4 i (without a gate 2 i).
    * norms, full: what goes in, normed, and what comes out, 6 h, the four former always float32. LoRA: no weight of
      theirs is trained, so 2 h of them float32, and what comes out as the input of the matrices.
    * bf16 full: every linear module has its own bfloat16 form of its input, 5 h. LoRA: so has every matrix A, where its
      input is not bfloat16 of one tensor, 5 h + q.
    * LoRA: what A gives, its rank, per wrapped module.
    * stages that draw answers, of models like Llama: no mask and nothing repeated (`tasks.train.online.attention`).
    * LoRA where `writes_out`: of the MLP the two projections only, 2 i, and of each norm what goes in and what comes
      out, once for all that use it, 4 h.
    """
    tokens, bf16 = batch.texts * batch.longest, settings["bf16"]
    h, i = model.hidden, model.intermediate
    q, k = model.heads * model.head_dim, model.key_value_heads * model.head_dim
    size = HALF if bf16 else SINGLE
    numbers, single = (
        2.0 * q + (2 * q if batch.masked else 2 * k) + (batch.longest if batch.masked else 0),
        1.0 * model.heads,
    )
    if settings["stage"] in ONLINE and model.family in LIKE_LLAMA:
        numbers, single = 2.0 * q + 2 * k, 0.0
    numbers, single = numbers + (4 if model.gated() else 2) * i, single + 2
    if writes_out(model, settings):
        numbers += 4 * h - 2 * i + settings["lora_rank"] * len(_of_first_layer(model, settings))
    elif settings["finetuning_type"] == "lora":
        modules = _of_first_layer(model, settings)
        numbers += settings["lora_rank"] * len(modules)
        single += 2 * h
        numbers += _inputs_of_matrices(modules, h, q) if bf16 else min(2, len(modules)) * h
    else:
        single += 4 * h
        numbers += (5 if bf16 else 2) * h
    return tokens * (numbers * size + single * SINGLE)


def writes_out(model: Architecture, settings: dict[str, Any]) -> bool:
    """Whether gradients are written out so that less is kept (`tasks.train.fast_lora`, `tasks.train.norms`).

    It is so for models like Llama in stages that draw answers, where all linear modules of a layer have plain adapters.
    """
    plain = settings["finetuning_type"] == "lora" and not settings["use_dora"] and "quant_bit" not in settings
    everything = plain and len(_of_first_layer(model, settings)) == sum(layer_of(f"{n}.") == 0 for n in model.linear())
    return everything and settings["stage"] in ONLINE and model.family in LIKE_LLAMA


def _of_first_layer(model: Architecture, settings: dict[str, Any]) -> set[str]:
    """The modules of the first layer that LoRA wraps; of a model without numbered layers, all."""
    return {name for name in wrapped(model, settings["lora_target"]) if (layer_of(f"{name}.") or 0) == 0}


def _inputs_of_matrices(modules: set[str], h: int, q: int) -> float:
    """Numbers per token of the inputs that LoRA's matrices keep in bf16: one form of its own for every module; that of
    the last projection of the MLP takes the place of the product."""
    ends = [name.rpartition(".")[2] for name in modules]
    outer = sum(name in ("o_proj", "wo", "dense", "out_proj") for name in ends)
    last = sum(name in ("down_proj", "fc2", "w2", "dense_4h_to_h") for name in ends)
    return (len(ends) - outer - last) * h + outer * q
