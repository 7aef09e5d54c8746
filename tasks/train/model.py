"""The model that is trained: base weights, precision, method.

One decision: nothing about what is trained is left to a library's guess. Names are checked against the model's modules
before anything is put in, and an adapter is only continued on the base weights it was made on.

Precision: `bf16` holds what is frozen in bfloat16 and what is trained in float32, and computes in bfloat16 autocast.
Without `bf16` everything is float32.
"""

from __future__ import annotations

from typing import Any

import torch

from registry.combinations import WITH_REFERENCE
from tasks.program import ProgramError
from tasks.train.adapters import continue_lora
from tasks.train.freezing import freeze
from tasks.train.loading import Changes, load_base, loading_arguments, refuse_quantised, stretched_positions
from tasks.train.lora import Note, add_lora, check_base, say
from tasks.train.reference import Reference, keep_adapter, without_dropout


def position_changes(settings: dict[str, Any], base: str, cutoff_len: int | None) -> Changes:
    """The fields of the base's config that `rope_scaling` changes.

    Args:
        settings: `TrainSettings.identity()`.
        base: folder of the base model.
        cutoff_len: of the rows; known where positions are to be stretched.
    """
    if settings["rope_scaling"] is None:
        return {}
    assert cutoff_len is not None
    changes = stretched_positions(base, settings["rope_scaling"], cutoff_len)
    print(f"rope_scaling {settings['rope_scaling']}: {changes or 'the rows fit, nothing is stretched'}", flush=True)
    return changes


def build_model(
    settings: dict[str, Any],
    base: str,
    base_digest: str,
    adapter: str | None,
    changes: Changes | None = None,
    note: Note = say,
) -> Any:
    """The model to train, on the CPU; quantised, on the device.

    Args:
        settings: `TrainSettings.identity()`.
        base: folder of the base model.
        base_digest: digest of the base weights.
        adapter: folder of a LoRA adapter to continue from, or None for new matrices.
        changes: of the base's config.
        note: gets what cannot be checked.
    """
    method = settings["finetuning_type"]
    if adapter and method != "lora":
        raise ProgramError(
            "bad_setting",
            f"an adapter cannot be continued with finetuning_type {method}. "
            "Merge it first, or train with finetuning_type lora.",
        )
    refuse_quantised(base)
    if adapter:
        _require_same_positions(check_base(adapter, base_digest, note), changes or {})
    dtype = torch.bfloat16 if settings["bf16"] and method == "lora" else torch.float32
    model = load_base(base, dtype, settings["stage"] == "rm", changes, **loading_arguments(settings))
    if settings["stage"] in WITH_REFERENCE:
        without_dropout(model)
    # Loading may draw random numbers for buffers it then overwrites; the matrices must not depend on how many.
    torch.manual_seed(settings["seed"])
    if method == "full":
        return model.requires_grad_(True)
    if method == "freeze":
        return freeze(model, settings)
    model = continue_lora(model, adapter, settings) if adapter else add_lora(model, settings)
    if adapter and settings["stage"] in WITH_REFERENCE:
        keep_adapter(model)
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    return model


def _require_same_positions(before: Changes, now: Changes) -> None:
    if before != now:
        raise ProgramError(
            "bad_setting",
            f"the adapter was trained with positions {before or 'as they are'}, these settings make them "
            f"{now or 'as they are'}. Set rope_scaling and cutoff_len as they were, or create_new_adapter: true.",
        )


def make_reference(
    settings: dict[str, Any], policy: Any, base: str, other: str | None, changes: Changes | None = None
) -> Reference | None:
    """The frozen model that a stage stays close to; None for stages and losses without one.

    Args:
        settings: `TrainSettings.identity()`.
        policy: what `build_model` made.
        base: folder of the base model.
        other: folder of another model to use as the reference; quantised like the base.
        changes: of the base's config.
    """
    if settings["stage"] not in WITH_REFERENCE or settings.get("pref_loss") == "simpo":
        return None
    if other is None and hasattr(policy, "peft_config"):
        return Reference(policy)
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    frozen = load_base(other or base, dtype, changes=None if other else changes, **loading_arguments(settings))
    if "quant_bit" in settings:
        return Reference(policy, frozen)
    return Reference(policy, frozen.to("cuda" if torch.cuda.is_available() else "cpu"))


@torch.no_grad()
def require_separation(model: Any, settings: dict[str, Any]) -> None:
    """Refuse packing for a model that lets packed rows see each other.

    Two rows of four tokens in one sequence: when the first changes, no bit of the second's logits may. Models that do
    not read position ids for their mask fail this; they would train on mixed rows and only a worse loss would show it.
    Some kernels read them in batches of one sequence only; so where batches are larger, both sequences are one batch.

    Args:
        model: as it will be trained.
        settings: `TrainSettings.identity()`.

    Raises:
        ProgramError: `bad_setting`.
    """
    training, device = model.training, model.device
    model.eval()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [4, 3, 2, 1, 5, 6, 7, 8]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device).expand(2, -1)
    size = min(settings["per_device_train_batch_size"], 2)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):
        one, other = torch.cat(
            [
                model(input_ids=rows, position_ids=places, use_cache=False).logits[:, 4:].float()
                for rows, places in zip(ids.split(size), positions.split(size), strict=True)
            ]
        )
    model.train(training)
    difference = float((one - other).abs().max())
    if difference > 1e-6 * max(1.0, float(one.abs().max())):
        raise ProgramError(
            "bad_setting",
            f"packing: {model.config.model_type} lets packed rows see each other (a change of the first row moves the "
            f"second's logits by {difference:.3g}). Set packing: false.",
        )
