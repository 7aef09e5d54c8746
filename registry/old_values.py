"""Values that others write otherwise: what they mean as settings here.

One decision: a value is translated where it means exactly one thing here, and refused with the cure where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.record import split_names

LOGGING_STEPS = 500  # transformers' own, between two measurements where nothing is said
DEEPSPEED = {
    "ds_z0_config.json": "zero0",
    "ds_z2_config.json": "zero2",
    "ds_z2_offload_config.json": "zero2_offload",
    "ds_z3_config.json": "zero3",
    "ds_z3_offload_config.json": "zero3_offload",
}
"""Names of LLaMA-Factory's DeepSpeed configs → the ready one that divides the same."""
ONLINE = "ONLINE"
REPORTED_ANYWAY = ("none", "all", "mlflow")


@dataclass(frozen=True)
class Meaning:
    """What a value means."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings it becomes; none where it asks for nothing."""
    refused: str = ""
    """Why it cannot be; continues `VALUE: `."""
    cure: str = ""
    silent: bool = False
    """It says the same in other words, or what is done anyway."""


NOTHING = Meaning(silent=True)
Convert = Callable[[Any, Mapping[str, Any]], Meaning | None]
"""Value, all settings → its meaning; None: it is a setting as it is."""


def _eval_strategy(value: Any, settings: Mapping[str, Any]) -> Meaning:
    """YAML reads a bare `no` as false."""
    if value in (False, "no", None):
        return Meaning({"eval_steps": None}) if settings.get("eval_steps") else NOTHING
    if value == "steps":
        known = settings.get("eval_steps")
        return NOTHING if known else Meaning({"eval_steps": settings.get("logging_steps", LOGGING_STEPS)})
    if value == "epoch":
        return Meaning(refused="held-out rows are measured every so many steps, not epochs", cure="Use eval_steps.")
    return Meaning(refused="should be no or steps")


def _warmup_steps(value: Any, settings: Mapping[str, Any]) -> Meaning:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value < 0 or (value > 1 and value != int(value)):
        return Meaning(refused="should be a number of steps")
    if value == 0:
        return NOTHING
    if value < 1:  # transformers 5 takes a share here
        return Meaning({"warmup_ratio": value})
    return Meaning({"warmup_steps": int(value)}, silent=True)


def _quantization_method(value: Any, settings: Mapping[str, Any]) -> Meaning:
    if str(value).lower() in ("bnb", "bitsandbytes", "bits_and_bytes"):
        return NOTHING
    return Meaning(refused="bitsandbytes alone quantises a base while it is trained on", cure="Use bnb.")


def _switch(on: Mapping[str, Any], off: Mapping[str, Any] | None = None) -> Convert:
    """A switch that is other settings when it is on, and perhaps others when it is off."""

    def convert(value: Any, settings: Mapping[str, Any]) -> Meaning:
        if value is None or (value is False and off is None):
            return NOTHING
        if not isinstance(value, bool):
            return Meaning(refused="should be true or false")
        return Meaning(on if value else off or {})

    return convert


def _flash_attn(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    return Meaning({"flash_attn": "eager"}) if value == "disabled" else None


def _resume(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    """True means the newest checkpoint of `output_dir`, which the same command finds by itself."""
    return NOTHING if value in (True, False) and isinstance(value, bool) else None


def _pref_loss(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    if value == "orpo" and settings.get("stage") == "dpo":
        return Meaning({"stage": "orpo"})
    if value == "kto_pair":
        return Meaning(refused="this loss is no longer in any library", cure="Use stage: kto with marked answers.")
    return None


def _report_to(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    """MLflow is told in any case; the boards among the others are a setting."""
    names = () if value is None else split_names(value)
    if not isinstance(names, tuple):
        return None
    others = [name for name in names if name not in REPORTED_ANYWAY]
    if len(others) < len(names) and others:
        return Meaning({"report_to": others})
    return None if others else NOTHING


def _deepspeed(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    """LLaMA-Factory's configs by path; a file that is there is read."""
    ready = DEEPSPEED.get(Path(value).name) if isinstance(value, str) else None
    return Meaning({"deepspeed": ready}) if ready and not Path(value).is_file() else None


def _dataset_dir(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    if isinstance(value, str) and Path(value).name == ONLINE:
        return Meaning({"dataset_dir": None})
    if isinstance(value, str) and "REMOTE:" in value:
        return Meaning(refused="a registry of data sets is read from a folder", cure="Download dataset_info.json.")
    return None


def _adapter(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    if isinstance(value, list) and len(value) == 1:
        return Meaning({"adapter_name_or_path": value[0]}, silent=True)
    if isinstance(value, list) or (isinstance(value, str) and "," in value and not Path(value).exists()):
        return Meaning(refused="one adapter is loaded, not several", cure="Merge the others first.")
    return None


def _optional(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    """Nothing is what those configs write for the default."""
    return NOTHING if value is None else None


def _best_metric(value: Any, settings: Mapping[str, Any]) -> Meaning | None:
    """The default in transformers' words and ours."""
    return NOTHING if value in (None, "loss", "eval_loss") else None


CONVERSIONS: dict[str, Convert] = {
    "metric_for_best_model": _best_metric,
    "eval_strategy": _eval_strategy,
    "evaluation_strategy": _eval_strategy,
    "warmup_steps": _warmup_steps,
    "quantization_method": _quantization_method,
    "neat_packing": _switch({"packing": True}),
    "disable_gradient_checkpointing": _switch({"gradient_checkpointing": False}, {"gradient_checkpointing": True}),
    "use_unsloth_gc": _switch({"gradient_checkpointing": True}),
    "split_special_tokens": _switch({"control_tokens": "plain"}, {"control_tokens": "keep"}),
    "adam8bit": _switch({"optim": "adamw_bnb_8bit"}),
    "flash_attn": _flash_attn,
    "resume_from_checkpoint": _resume,
    "pref_loss": _pref_loss,
    "report_to": _report_to,
    "deepspeed": _deepspeed,
    "dataset_dir": _dataset_dir,
    "adapter_name_or_path": _adapter,
    **dict.fromkeys(
        (
            *("packing", "save_total_limit", "template", "eval_dataset", "interleave_probs", "add_tokens", "fsdp"),
            *("add_special_tokens", "additional_target", "freeze_extra_modules", "model_revision"),
            "gradient_checkpointing",
        ),
        _optional,
    ),
}
"""Argument → what its values mean."""
MEANINGS = {
    "metric_for_best_model": "the same; `loss` is `eval_loss`",
    "eval_strategy": "`eval_steps`, or `logging_steps` where that is not given; `no` measures after training only",
    "evaluation_strategy": "as `eval_strategy`",
    "warmup_steps": "the same; below 1 it is `warmup_ratio`",
    "quantization_method": "`bnb`, which is what there is; others are refused",
    "neat_packing": "`packing`, whose rows never see each other",
    "disable_gradient_checkpointing": "`gradient_checkpointing`, the other way round",
    "use_unsloth_gc": "`gradient_checkpointing`",
    "split_special_tokens": "`control_tokens`: `plain` for true, `keep` for false",
    "adam8bit": "`optim: adamw_bnb_8bit`",
    "flash_attn": "the same; `disabled` is `eager`",
    "resume_from_checkpoint": "the same; true is not needed: an interrupted run goes on by the same command",
    "report_to": "the same, `tensorboard` and `wandb`; MLflow is told in any case; `none` and `all` ask nothing",
    "pref_loss": "the same; `orpo` is `stage: orpo`, `kto_pair` is refused",
    "deepspeed": "the same; where there is no such file, `ds_z3_config.json` and its like are `zero3` …",
    "dataset_dir": "the same; `ONLINE` is not needed: a hub id is one",
    "adapter_name_or_path": "the same; one adapter, not several",
}
"""What is told of them in the documentation."""
