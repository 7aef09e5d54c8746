"""The model that is trained: base weights, precision, LoRA.

One decision: nothing about what is trained is left to a library's guess. Names are checked against the model's
linear modules before LoRA is put in, and an adapter is only continued on the base weights it was made on.

Precision: `bf16` with LoRA holds the frozen base in bfloat16 and the matrices in float32; `bf16` with full tuning holds
float32 master weights; both compute in bfloat16 autocast. Without `bf16` everything is float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from registry.combinations import WITH_REFERENCE
from registry.errors import did_you_mean
from tasks.program import ProgramError
from tasks.train.reference import Reference, keep_adapter, without_dropout
from tasks.train.reward import SCORE_HEAD, load_scoring

BASE_RECORD = "base.json"  # beside every adapter and model: the digest of the base weights it was made on
SEPARATING_ATTENTION = ("sdpa", "eager")  # those that keep packed rows apart by position ids also in batches of packs
ALL = "all"


def load_base(folder: str, dtype: torch.dtype, score: bool = False) -> Any:
    """Load a model from a local folder; safetensors only, no code from the folder is run.

    Args:
        folder: config.json and *.safetensors.
        dtype: what the weights are held in, whatever they were saved in.
        score: with a head that gives one score, instead of the language model's.
    """
    from transformers import AutoModelForCausalLM

    if score:
        model = load_scoring(folder, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    implementation = model.config._attn_implementation
    if implementation not in SEPARATING_ATTENTION:
        model.set_attn_implementation("eager")
    return model


def check_base(folder: str, base_digest: str) -> None:
    """Refuse an adapter that was made on other base weights.

    Raises:
        ProgramError: `bad_setting` with both digests; PEFT would load it on any base of equal shape without a word.
    """
    path = Path(folder) / BASE_RECORD
    if not path.is_file():
        raise ProgramError(
            "bad_setting",
            f"the adapter has no {BASE_RECORD}, so nobody knows which base weights it belongs to. "
            f'If it belongs to these, write {{"base_digest": "{base_digest}"}} into that file.',
        )
    made_on = json.loads(path.read_text(encoding="utf-8"))["base_digest"]
    if made_on != base_digest:
        raise ProgramError(
            "bad_setting",
            f"the adapter was trained on base weights {made_on}, this base has {base_digest}. "
            "Use the base it was trained on, or train a new adapter.",
        )


def linear_modules(model: Any) -> dict[str, str]:
    """Full name → last part of the name, of every linear module but the output head."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, SCORE_HEAD, None) or model.get_output_embeddings()
    return {
        name: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def resolve_targets(model: nn.Module, asked: list[str]) -> list[str]:
    """The module names LoRA goes to.

    Args:
        model: the base model.
        asked: `["all"]`, or ends of module names as in `q_proj` or `self_attn.q_proj`.

    Raises:
        ProgramError: `bad_setting` when a name matches no linear module; PEFT only notices when all of them miss.
    """
    modules = linear_modules(model)
    known = sorted(set(modules.values()))
    if ALL in asked:
        return known
    unknown = [name for name in asked if not any(_ends_with(module, name) for module in modules)]
    if unknown:
        raise ProgramError(
            "bad_setting",
            f"lora_target {', '.join(unknown)} matches no linear module of {type(model).__name__}. "
            f"{did_you_mean(unknown[0], known)} Its linear modules: {', '.join(known)}; or write all.",
        )
    return sorted(asked)


def add_lora(model: Any, settings: dict[str, Any]) -> Any:
    """Put new LoRA matrices, float32, beside the linear modules that `settings` names."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS"
        if settings["stage"] == "rm"
        else "CAUSAL_LM",  # SEQ_CLS trains and saves the score head too
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=resolve_targets(model, settings["lora_target"]),
    )
    return get_peft_model(model, config)


def continue_lora(model: Any, adapter: str, settings: dict[str, Any], base_digest: str) -> Any:
    """Load an adapter to train it on.

    Raises:
        ProgramError: `bad_setting` when it was made on another base, or has another rank, scale or other modules
            than `settings` says: those are fixed when an adapter is made.
    """
    from peft import LoraConfig, PeftModel

    check_base(adapter, base_digest)
    config = LoraConfig.from_pretrained(adapter)
    differences = [
        f"{name} is {asked}, the adapter has {found}"
        for name, asked, found in (
            ("lora_rank", settings["lora_rank"], config.r),
            ("lora_alpha", settings["lora_alpha"], config.lora_alpha),
            (
                "lora_target",
                ", ".join(resolve_targets(model, settings["lora_target"])),
                ", ".join(sorted(config.target_modules)),
            ),
        )
        if asked != found
    ]
    if differences:
        raise ProgramError(
            "bad_setting",
            f"{'; '.join(differences)}. Set them to the adapter's values, or merge it and train a new one.",
        )
    config.lora_dropout = settings["lora_dropout"]
    return PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)


def build_model(settings: dict[str, Any], base: str, base_digest: str, adapter: str | None) -> Any:
    """The model to train, on the CPU.

    Args:
        settings: `TrainSettings.identity()`.
        base: folder of the base model.
        base_digest: digest of the base weights.
        adapter: folder of a LoRA adapter to continue from, or None for new matrices.
    """
    lora = settings["finetuning_type"] == "lora"
    if adapter and not lora:
        raise ProgramError(
            "bad_setting",
            f"an adapter cannot be continued with finetuning_type {settings['finetuning_type']}. "
            "Merge it first, or train with finetuning_type lora.",
        )
    score = settings["stage"] == "rm"
    model = load_base(base, torch.bfloat16 if settings["bf16"] and lora else torch.float32, score)
    if settings["stage"] in WITH_REFERENCE:
        without_dropout(model)
    # Loading may draw random numbers for buffers it then overwrites; the matrices must not depend on how many.
    torch.manual_seed(settings["seed"])
    if not lora:
        return model.requires_grad_(True)
    if not adapter:
        return add_lora(model, settings)
    model = continue_lora(model, adapter, settings, base_digest)
    if settings["stage"] in WITH_REFERENCE:
        keep_adapter(model)
    return model


def make_reference(settings: dict[str, Any], policy: Any, base: str, other: str | None) -> Reference | None:
    """The frozen model that a stage stays close to; None for stages and losses without one.

    Args:
        settings: `TrainSettings.identity()`.
        policy: what `build_model` made.
        base: folder of the base model.
        other: folder of another model to use as the reference.
    """
    if settings["stage"] not in WITH_REFERENCE or settings.get("pref_loss") == "simpo":
        return None
    if other is None and hasattr(policy, "peft_config"):
        return Reference(policy)
    frozen = load_base(other or base, torch.bfloat16 if settings["bf16"] else torch.float32)
    return Reference(policy, frozen.to("cuda" if torch.cuda.is_available() else "cpu"))


@torch.no_grad()
def require_separation(model: Any) -> None:
    """Refuse packing for a model that lets packed rows see each other.

    Two rows of four tokens in one sequence: when the first changes, no bit of the second's logits may. Models that do
    not read position ids for their mask fail this; they would train on mixed rows and only a worse loss would show it.

    Raises:
        ProgramError: `bad_setting`.
    """
    training = model.training
    model.eval()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [4, 3, 2, 1, 5, 6, 7, 8]], device=model.device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=model.device).expand(2, -1)
    one, other = (
        model(input_ids=ids[row : row + 1], position_ids=positions[:1], use_cache=False).logits[0, 4:].float()
        for row in (0, 1)
    )
    model.train(training)
    difference = float((one - other).abs().max())
    if difference > 1e-6 * max(1.0, float(one.abs().max())):
        raise ProgramError(
            "bad_setting",
            f"packing: {model.config.model_type} lets packed rows see each other (a change of the first row moves the "
            f"second's logits by {difference:.3g}). Set packing: false.",
        )


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
