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

from tasks.program import ProgramError
from tasks.train.callbacks import EVAL_LOSS, best_line
from tasks.train.model import BASE_RECORD

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


def save_weights(model: Any, folder: Path, base_name: str = "") -> None:
    """Save the adapter of a PEFT model, or all weights of another model.

    Args:
        model: the unwrapped model.
        folder: where to; made when missing.
        base_name: registry or hub name of the base, for `adapter_config.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        _save_adapter(model, folder, base_name)
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


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the folder's safetensors files, read from their headers."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def wrapped_modules(model: Any) -> list[str]:
    """Full names of the modules that got LoRA matrices, as in the saved file, sorted."""
    return sorted(name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A"))


def check_saved_adapter(model: Any, folder: Path) -> list[str]:
    """Open the saved adapter and compare it with what was wrapped.

    Returns:
        Last parts of the names of the wrapped modules, sorted.

    Raises:
        ProgramError: `unexpected` when a wrapped module has no A or B in the file, or an empty one.
    """
    shapes = saved_shapes(folder)
    wrapped = wrapped_modules(model)
    expected = {f"{name}.lora_{part}.weight" for name in wrapped for part in "AB"}
    empty = sorted(name for name, shape in shapes.items() if math.prod(shape) == 0)
    if not wrapped or not expected <= set(shapes) or empty:
        missing = sorted(expected - set(shapes))
        raise ProgramError(
            "unexpected", f"{len(wrapped)} modules were wrapped; missing in the file: {missing[:5]}, empty: {empty[:5]}"
        )
    return sorted({name.rpartition(".")[2] for name in wrapped})


def require_finite(model: Any) -> None:
    """Refuse to save weights that are not numbers.

    Raises:
        ProgramError: `not_finite`; the last step's update is seen by no later loss.
    """
    bad = [name for name, value in model.named_parameters() if value.requires_grad and not torch.isfinite(value).all()]
    if bad:
        raise ProgramError("not_finite", f"{bad[0]} and {len(bad) - 1} more weights are not finite after the last step")


def summary(lines: Sequence[dict[str, Any]], steps_per_epoch: int) -> dict[str, Any]:
    """The numbers of `train.json` that come from the steps' own lines; no clock in them."""
    losses = [line["loss"] for line in lines]
    count = max(1, math.ceil(len(losses) / 10))
    last = losses[-count:]
    metrics = {
        name: math.fsum(line[name] for line in lines[-count:]) / count
        for name in ("rewards/accuracies", "rewards/margins")
        if all(name in line for line in lines[-count:])
    }
    best = best_line(lines)
    if best:
        metrics |= {"best_step": best["step"], "best_eval_loss": best[EVAL_LOSS]}
    return metrics | {
        "steps": len(lines),
        "epochs": len(lines) / steps_per_epoch,
        "train_loss": math.fsum(last) / len(last),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trained_tokens": lines[-1]["trained_tokens"],
    }


def write_artifact(
    model: Any, output: Path, base: Path, base_name: str, base_digest: str, numbers: dict[str, Any]
) -> None:
    """Write everything but `report/`.

    Args:
        model: the trained, unwrapped model.
        output: the artifact's folder.
        base: folder of the base model.
        base_name: registry or hub name of the base, or empty.
        base_digest: digest of the base weights.
        numbers: what `summary` made.
    """
    require_finite(model)
    suffixes: list[str] = []
    if hasattr(model, "peft_config"):
        save_weights(model, output, base_name)
        suffixes = check_saved_adapter(model, output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        save_model(model, output, base)
    copy_tokenizer(base, output)
    write_json(output / BASE_RECORD, {"base_digest": base_digest})
    sizes = [(value.numel(), value.requires_grad) for value in model.parameters()]
    write_json(
        output / "train.json",
        numbers
        | {
            "trainable_parameters": sum(size for size, trained in sizes if trained),
            "all_parameters": sum(size for size, _ in sizes),
            "wrapped_modules": suffixes,
        },
    )


def _save_adapter(model: Any, folder: Path, base_name: str) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": base_name}
    write_json(folder / ADAPTER_CONFIG, {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()})
