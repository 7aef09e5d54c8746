"""What training leaves behind.

One decision: everything that depends on the clock goes to `report/`; the rest has the same bytes each time the same run
is made, on any machine path: sorted JSON, no README with a date, no path of the base model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tasks.artifacts import BASE_RECORD
from tasks.program import ProgramError
from tasks.train.callbacks import EVAL_LOSS, best_line
from tasks.train.checkpoints import saved_shapes
from tasks.train.freezing import trained_parameters
from tasks.train.lora import adapter_state
from tasks.train.reference import ADAPTER

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy tokenizer files and chat template byte for byte; their names.

    Saving a loaded tokenizer instead would rewrite them: transformers adds, drops and reorders fields.
    """
    names = []
    for path in sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}):
        name = path.relative_to(source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        names.append(name.as_posix())
    return names


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def save_weights(model: Any, folder: Path, base_name: str = "", for_plain_base: bool = False) -> None:
    """Save the adapter of a PEFT model, or all weights of another model.

    Args:
        model: the unwrapped model.
        folder: where to; made when missing.
        base_name: registry or hub name of the base, for `adapter_config.json`.
        for_plain_base: see `tasks.train.lora.adapter_state`; not in a checkpoint, which is continued as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        _save_adapter(model, folder, base_name, for_plain_base)
    else:
        save_model(model, folder)


def save_model(model: Any, folder: Path, base: Path | None = None) -> None:
    """Save config and weights of a whole model; the generation config is the base's file, byte for byte.

    Raises:
        ProgramError: `unexpected` when the number of parameters in the files is not the model's.
    """
    from transformers import GenerationConfig

    kept = getattr(model, "generation_config", None)  # a reward model has none
    if kept is not None:
        model.generation_config = GenerationConfig()  # transformers refuses to save some published ones again
    model.save_pretrained(folder)
    if kept is not None:
        model.generation_config = kept
    (folder / "generation_config.json").unlink(missing_ok=True)
    if kept is not None and base and (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    check_saved_model(model, folder)


def check_saved_model(model: Any, folder: Path) -> None:
    """Compare the number of parameters in the safetensors files with the model's; a tied weight counts once.

    Names are not compared: some architectures are saved under their published names, one tensor per expert where the
    model holds one for all.

    Raises:
        ProgramError: `unexpected`.
    """
    buffers = {name for name, _ in model.named_buffers()}
    saved = {name: math.prod(shape) for name, shape in saved_shapes(folder).items() if name not in buffers}
    parameters = {name: value.numel() for name, value in model.named_parameters()}
    found, expected = sum(saved.values()), sum(parameters.values())
    if found != expected:
        lost, strangers = sorted(set(parameters) - set(saved)), sorted(set(saved) - set(parameters))
        raise ProgramError(
            "unexpected",
            f"the saved files hold {found} parameters, the model has {expected}; "
            f"only in the model: {lost[:5]}, only in the files: {strangers[:5]}",
        )


def wrapped_modules(model: Any) -> list[str]:
    """Full names of the modules that got LoRA matrices, as in the saved file, sorted."""
    return sorted(name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A"))


def whole_modules(model: Any) -> dict[str, list[str]]:
    """Full name, as in the saved file, of each module that is trained whole beside LoRA → its parameters' names."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {
        name: [part for part, _ in module.modules_to_save[ADAPTER].named_parameters()]
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }


def check_saved_adapter(model: Any, folder: Path) -> dict[str, Any]:
    """Open the saved adapter and compare it with what was wrapped, tensor by tensor.

    Returns:
        For the report: last parts of the names of the wrapped modules and how many they are, the modules trained whole,
        and the number of tensors in the file.

    Raises:
        ProgramError: `unexpected` when the file lacks a tensor of a wrapped module, holds another, or an empty one.
    """
    shapes = saved_shapes(folder)
    wrapped, whole = wrapped_modules(model), whole_modules(model)
    parts = ["lora_A.weight", "lora_B.weight"]
    if model.peft_config[ADAPTER].use_dora:
        parts.append("lora_magnitude_vector")
    expected = {f"{name}.{part}" for name in wrapped for part in parts}
    expected |= {f"{name}.{part}" for name, own in whole.items() for part in own}
    empty = sorted(name for name, shape in shapes.items() if math.prod(shape) == 0)
    if not wrapped or expected != set(shapes) or empty:
        missing, strangers = sorted(expected - set(shapes)), sorted(set(shapes) - expected)
        raise ProgramError(
            "unexpected",
            f"{len(wrapped)} modules were wrapped; missing in the file: {missing[:5]}, empty: {empty[:5]}, "
            f"only in the file: {strangers[:5]}",
        )
    return {
        "wrapped_modules": sorted({name.rpartition(".")[2] for name in wrapped}),
        "wrapped": len(wrapped),
        "whole_modules": sorted({name.rpartition(".")[2] for name in whole}),
        "saved_tensors": len(shapes),
    }


def require_finite(model: Any) -> None:
    """Refuse to save weights that are not numbers.

    Raises:
        ProgramError: `not_finite`; the last step's update is seen by no later loss.
    """
    bad = [name for name, value in model.named_parameters() if value.requires_grad and not torch.isfinite(value).all()]
    if bad:
        raise ProgramError("not_finite", f"{bad[0]} and {len(bad) - 1} more weights are not finite after the last step")


def summary(lines: Sequence[dict[str, Any]], steps_per_epoch: int, best_by: str = EVAL_LOSS) -> dict[str, Any]:
    """The numbers of `train.json` that come from the steps' own lines; no clock in them."""
    losses = [line["loss"] for line in lines]
    count = max(1, math.ceil(len(losses) / 10))
    last = losses[-count:]
    metrics = {
        name: math.fsum(line[name] for line in lines[-count:]) / count
        for name in ("rewards/accuracies", "rewards/margins")
        if all(name in line for line in lines[-count:])
    }
    best = best_line(lines, best_by)
    if best:
        metrics |= {"best_step": best["step"], f"best_{best_by}": best[best_by]}
    return metrics | {
        "steps": lines[-1]["step"],  # a given checkpoint may have some behind it whose lines nobody has
        "epochs": lines[-1]["step"] / steps_per_epoch,
        "train_loss": math.fsum(last) / len(last),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trained_tokens": lines[-1]["trained_tokens"],
    }


def write_artifact(
    model: Any,
    output: Path,
    base: Path,
    base_name: str,
    record: dict[str, Any],
    settings: dict[str, Any],
    numbers: dict[str, Any],
) -> None:
    """Write everything but `report/`.

    Args:
        model: the trained, unwrapped model.
        output: the artifact's folder.
        base: folder of the base model.
        base_name: registry or hub name of the base, or empty.
        record: digest of the base weights, and what was changed in the base's config.
        settings: `TrainSettings.identity()`.
        numbers: what `summary` made.
    """
    require_finite(model)
    sizes = [(value.numel(), value.requires_grad) for value in model.parameters()]
    trained = trained_parameters(model)
    modules: dict[str, Any] = {"wrapped_modules": []}
    if hasattr(model, "peft_config"):
        save_weights(model, output, base_name, for_plain_base=settings["pissa_init"])
        modules = check_saved_adapter(model, output)
        print(_modules_sentence(settings, modules), flush=True)
    else:
        output.mkdir(parents=True, exist_ok=True)
        save_model(model.float(), output, base)
    copy_tokenizer(base, output)
    write_json(output / BASE_RECORD, record)
    write_json(
        output / "train.json",
        numbers
        | {
            "trainable_parameters": sum(size for size, trained in sizes if trained),
            "all_parameters": sum(size for size, _ in sizes),
            "trained_parameters": trained,
        }
        | modules,
    )


def _modules_sentence(settings: dict[str, Any], modules: dict[str, Any]) -> str:
    """What was asked for, what was wrapped, what was saved."""
    asked = f"lora_target {', '.join(settings['lora_target'])}"
    if settings["additional_target"]:
        asked += f", additional_target {', '.join(settings['additional_target'])}"
    whole = f"; trained whole: {', '.join(modules['whole_modules'])}" if modules["whole_modules"] else ""
    return (
        f"{asked}: {modules['wrapped']} modules wrapped ({', '.join(modules['wrapped_modules'])}){whole}; "
        f"{modules['saved_tensors']} tensors saved, all of theirs"
    )


def _save_adapter(model: Any, folder: Path, base_name: str, for_plain_base: bool) -> None:
    from safetensors.torch import save_file

    state, config = adapter_state(model, for_plain_base)
    # a copy of each: two names of one tensor, as of a tied embedding, cannot be in one file
    save_file(
        {name: value.clone().contiguous() for name, value in state.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    config |= {"inference_mode": True, "base_model_name_or_path": base_name}
    write_json(folder / ADAPTER_CONFIG, {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()})
