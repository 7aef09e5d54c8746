"""Which settings go together: one table for the validator, the keys of steps, the documentation and the tests.

One decision: a setting without effect is one kind of thing (`NEEDS`), whether that is because of the stage, the method
or another setting. It never enters a key, and whoever writes it is told. What has an effect and cannot be done is
another (`REFUSALS`), with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from registry.method_records import LoraSettings
from registry.online_records import OnlineSettings, PpoSettings
from registry.optimizers import OPTIMIZERS

SET, UNSET = ("set",), ("unset",)  # instead of a tuple of values: anything but nothing, 0, False; or just those
Condition = Mapping[str, tuple[Any, ...]]
COMPARING = ("rm", "dpo", "kto", "orpo")
WITHOUT_CRITIC = ("grpo", "rloo")
ONLINE = ("ppo", *WITHOUT_CRITIC)
WITH_REFERENCE = ("dpo", "kto", *ONLINE)
ROWS_GIVEN = ("pt", "sft", *COMPARING)
WARMED = ("linear", "cosine", "constant_with_warmup")
CLUSTERS = ("slurm", "kubernetes")
ADDED = ("add_tokens", "add_special_tokens")
WHOLE_MATRICES = tuple(name for name, optimizer in OPTIMIZERS.items() if optimizer.whole_matrices)


@dataclass(frozen=True)
class Need:
    """Settings that have an effect only where others have certain values."""

    settings: tuple[str, ...]
    where: Condition
    refused: bool = True
    """Whether writing one of them elsewhere is an error; not where configs commonly say both."""


@dataclass(frozen=True)
class Refusal:
    """What cannot be asked for together."""

    setting: str
    """The one that is named in the error."""
    when: Condition
    reason: str
    cure: str


NEEDS: tuple[Need, ...] = (
    Need(tuple(LoraSettings.model_fields), {"finetuning_type": ("lora",)}),
    Need(("adapter_name_or_path",), {"finetuning_type": ("lora",)}),
    Need(("resume",), {"resume_from_checkpoint": SET}),
    Need(("quant_bit",), {"quant_bit": SET}, refused=False),
    Need(("quant_type", "double_quantization"), {"quant_bit": (4,)}),
    Need(
        ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
        {"finetuning_type": ("freeze",)},
    ),
    Need(("num_train_epochs",), {"max_steps": UNSET}, refused=False),
    Need(("max_steps",), {"max_steps": SET}, refused=False),
    Need(("warmup_ratio", "warmup_steps"), {"lr_scheduler_type": WARMED}, refused=False),
    Need(("warmup_ratio",), {"warmup_steps": UNSET}, refused=False),
    Need(("warmup_steps",), {"warmup_steps": SET}, refused=False),
    Need(("pref_loss",), {"stage": ("dpo",)}),
    Need(("pref_beta",), {"stage": ("dpo", "kto", "orpo")}),
    Need(("pref_ftx",), {"stage": ("dpo", "kto")}),
    Need(("dpo_label_smoothing",), {"stage": ("dpo",), "pref_loss": ("sigmoid", "robust", "exo_pair")}),
    Need(("simpo_gamma",), {"stage": ("dpo",), "pref_loss": ("simpo",)}),
    Need(("kto_chosen_weight", "kto_rejected_weight"), {"stage": ("kto",)}),
    Need(("center_rewards_coefficient",), {"stage": ("rm",)}),
    Need(("center_rewards_coefficient",), {"center_rewards_coefficient": SET}, refused=False),
    Need(("early_stopping_steps", "load_best_model_at_end", "metric_for_best_model"), {"eval_steps": SET}),
    Need(("ref_model",), {"stage": WITH_REFERENCE}),
    Need(tuple(OnlineSettings.model_fields), {"stage": ONLINE}),
    Need(tuple(PpoSettings.model_fields), {"stage": ("ppo",)}),
    Need(("num_generations",), {"stage": WITHOUT_CRITIC}),
    Need(("scale_rewards", "loss_type"), {"stage": ("grpo",)}),
    Need(("mask_history", "train_on_prompt", "cut_answers", "val_size"), {"stage": ROWS_GIVEN}),
    Need(("eval_steps", "neftune_noise_alpha"), {"stage": ROWS_GIVEN}),
    Need(("nnodes",), {"launcher": CLUSTERS}),
    Need(("slurm",), {"launcher": ("slurm",)}, refused=False),
    Need(("kubernetes",), {"launcher": ("kubernetes",)}, refused=False),
    Need(("deepspeed",), {"deepspeed": SET}, refused=False),
    Need(("fsdp",), {"fsdp": SET}, refused=False),
)

DERIVED = ("zero_stage", "zero_only")
"""Conditions that are no settings: what the config that `deepspeed` names divides, and whether it says nothing else
(`registry.deepspeed`)."""

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "quant_bit",
        {"quant_bit": SET, "finetuning_type": ("full", "freeze")},
        "quantised weights cannot be moved, only matrices beside them can",
        "Use finetuning_type: lora, or remove quant_bit and use_qlora.",
    ),
    Refusal(
        "pissa_init",
        {"pissa_init": (True,), "quant_bit": SET},
        "pissa_init takes singular values out of the base, which a quantised base cannot give up exactly",
        "Remove one of pissa_init and quant_bit.",
    ),
    Refusal(
        "pissa_init",
        {"pissa_init": (True,), "use_dora": (True,)},
        "what pissa_init starts from is taken off again when the adapter is saved; with use_dora that is no sum",
        "Remove one of pissa_init and use_dora.",
    ),
    Refusal(
        "pissa_init",
        {"pissa_init": (True,), "adapter_name_or_path": SET, "create_new_adapter": (False,)},
        "an adapter that is trained on has its first values already",
        "Set create_new_adapter: true, or remove pissa_init.",
    ),
    Refusal(
        "resume_from_checkpoint",
        {"resume_from_checkpoint": SET, "pissa_init": (True,)},
        "the matrices of a checkpoint belong to what its own pissa_init left of the base",
        "Finish that run, and start from its adapter with adapter_name_or_path.",
    ),
    Refusal(
        "resume_from_checkpoint",
        {"resume_from_checkpoint": SET, "resume": ("exact",), "load_best_model_at_end": (True,)},
        "the best weights may be those of an earlier step, which the checkpoint does not hold",
        "Remove load_best_model_at_end, or set resume: weights_only.",
    ),
    Refusal(
        "resume_from_checkpoint",
        {"resume_from_checkpoint": SET, "resume": ("exact",), "deepspeed": SET},
        "DeepSpeed reads its optimizer state with pickle, which can run code that somebody put into the folder",
        "Set resume: weights_only. A run of your own that was interrupted goes on by the same command.",
    ),
    *(
        Refusal(
            name,
            {name: SET, "stage": (*ONLINE, "rm")},
            "the judges and the reference are of the model as it was",
            "Add tokens in an sft stage, and start from that.",
        )
        for name in ADDED
    ),
    *(
        Refusal(
            name,
            {name: SET, "adapter_name_or_path": SET},
            "the adapter belongs to the model as it was",
            "Merge it first (llamatuner export), or remove one of the two.",
        )
        for name in ADDED
    ),
    *(
        Refusal(
            name,
            {name: SET, "finetuning_type": ("freeze",), "freeze_extra_modules": UNSET},
            "the embedding would stay as it is, so nothing would be learned about new tokens",
            "Name the embedding in freeze_extra_modules, or use finetuning_type: lora.",
        )
        for name in ADDED
    ),
    Refusal(
        "create_new_adapter",
        {"create_new_adapter": (True,), "adapter_name_or_path": UNSET},
        "there is no adapter to merge first",
        "Set adapter_name_or_path, or remove create_new_adapter: every new run makes a new adapter.",
    ),
    Refusal(
        "freeze_trainable_layers",
        {"finetuning_type": ("freeze",), "freeze_trainable_layers": UNSET, "freeze_extra_modules": UNSET},
        "0 layers and no freeze_extra_modules leave nothing to train",
        "Train the last n layers with n, the first n with -n.",
    ),
    Refusal(
        "flash_attn",
        {"flash_attn": ("fa2",), "bf16": (False,)},
        "fa2 computes in bfloat16 only",
        "Set bf16: true, or use flash_attn: sdpa.",
    ),
    *(
        Refusal("optim", {"optim": (name,)}, f"{name}: {optimizer.refused}", "Use optim: adamw_torch_fused.")
        for name, optimizer in OPTIMIZERS.items()
        if optimizer.refused
    ),
    Refusal(
        "optim",
        {"optim": WHOLE_MATRICES, "finetuning_type": ("lora",)},
        "this optimizer projects the gradients of whole weight matrices; LoRA's are small already",
        "Use finetuning_type: full, or optim: adamw_torch_fused.",
    ),
    Refusal(
        "packing",
        {"packing": (True,), "stage": COMPARING},
        "answers are compared as wholes, a packed sequence holds several",
        "Remove packing.",
    ),
    Refusal(
        "packing",
        {"packing": (True,), "stage": ONLINE},
        "every prompt is answered on its own, a packed sequence holds several",
        "Remove packing.",
    ),
    Refusal(
        "overlong",
        {"overlong": ("truncate",), "stage": ONLINE},
        "a prompt that is cut behind has lost the place where its answer begins",
        "Use overlong: drop.",
    ),
    Refusal(
        "lora_dropout",
        {"lora_dropout": SET, "stage": ONLINE},
        "dropout would move the probabilities of a step's answers before anything is learned",
        "Remove lora_dropout.",
    ),
    Refusal(
        "loraplus_lr_ratio",
        {"loraplus_lr_ratio": SET, "stage": ONLINE},
        "the policy has one learning rate, and so has the critic",
        "Remove loraplus_lr_ratio.",
    ),
    Refusal(
        "pissa_init",
        {"pissa_init": (True,), "stage": ONLINE},
        "the reward model and the reference need the base as it was, and pissa_init takes values out of it",
        "Remove pissa_init.",
    ),
    Refusal(
        "additional_target",
        {"additional_target": SET, "stage": ONLINE},
        "the reference and the judges share the base, and these modules would be the policy's alone",
        "Remove additional_target.",
    ),
    Refusal(
        "deepspeed",
        {"deepspeed": SET, "zero_only": (False,), "stage": ONLINE},
        "the stage divides optimizer state and gradients by itself; weights have to be whole to draw answers",
        "Use deepspeed: zero2, or zero1.",
    ),
    Refusal(
        "fsdp",
        {"fsdp": SET, "stage": ONLINE},
        "weights have to be whole to draw answers, and fsdp divides them",
        "Use deepspeed: zero2, which divides optimizer state and gradients.",
    ),
    Refusal(
        "resume_from_checkpoint",
        {"resume_from_checkpoint": SET, "stage": ONLINE},
        "a run of this stage goes on by the same command, from its own newest checkpoint only",
        "Remove resume_from_checkpoint.",
    ),
    Refusal(
        "reward_model",
        {"stage": ONLINE, "reward_model": UNSET, "reward_funcs": UNSET},
        "nothing says what a good answer is",
        "Set reward_model to a stage or a model, or reward_funcs.",
    ),
    *(
        Refusal("optim", {"optim": (name,), "stage": ONLINE}, reason, "Use optim: adamw_torch_fused.")
        for name, optimizer in OPTIMIZERS.items()
        for reason in ("this optimizer projects the gradients of whole matrices of one model; here two may learn",)
        if optimizer.whole_matrices and not optimizer.refused
    ),
    Refusal(
        "train_on_prompt",
        {"train_on_prompt": (True,), "stage": COMPARING},
        "two answers are compared, and both have the same prompt",
        "Remove train_on_prompt.",
    ),
    Refusal(
        "overlong",
        {"overlong": ("truncate",), "stage": COMPARING},
        "a cut answer would be compared with a whole one",
        "Use overlong: drop.",
    ),
    Refusal(
        "ref_model",
        {"ref_model": SET, "stage": ("dpo",), "pref_loss": ("simpo",)},
        "simpo has no reference model",
        "Remove ref_model.",
    ),
    Refusal(
        "pref_loss",
        {"pref_loss": ("exo_pair",), "dpo_label_smoothing": UNSET, "stage": ("dpo",)},
        "exo_pair takes the logarithm of dpo_label_smoothing, which is 0",
        "Set dpo_label_smoothing: 0.001, the value of its paper (arXiv:2402.00856).",
    ),
    Refusal(
        "fsdp",
        {"fsdp": SET, "deepspeed": SET},
        "fsdp and deepspeed both divide the memory among processes",
        "Choose one.",
    ),
    *(
        Refusal(
            "load_best_model_at_end",
            {"load_best_model_at_end": (True,), launcher: SET},
            f"{launcher} cannot put the weights of an earlier checkpoint back into a model that it has divided",
            f"Remove load_best_model_at_end, or {launcher}.",
        )
        for launcher in ("deepspeed", "fsdp")
    ),
    Refusal(
        "deepspeed",
        {"deepspeed": SET, "zero_stage": (3,), "quant_bit": SET},
        "ZeRO-3 divides weights, and the scales of a quantised one do not go with its parts",
        "Use deepspeed: zero2, or remove quant_bit.",
    ),
    Refusal(
        "fsdp",
        {"fsdp": SET, "quant_bit": SET},
        "FSDP divides weights, and the scales of a quantised one do not go with its parts",
        "Use deepspeed: zero2, or remove quant_bit.",
    ),
)


def holds(condition: Condition, settings: Mapping[str, Any]) -> bool:
    """Whether every setting has one of the values a condition wants.

    >>> holds({"stage": ("dpo",), "ref_model": UNSET}, {"stage": "dpo", "ref_model": None})
    True
    """
    return all(_fits(wanted, settings.get(name)) for name, wanted in condition.items())


def _fits(wanted: tuple[Any, ...], value: Any) -> bool:
    if wanted in (SET, UNSET):
        return bool(value) == (wanted == SET)
    return value in wanted


def without_effect(settings: Mapping[str, Any]) -> list[str]:
    """The settings among the given ones that change nothing, by name."""
    names = {name for need in NEEDS if not holds(need.where, settings) for name in need.settings}
    return sorted(names & set(settings))


def idle(settings: Mapping[str, Any], written: set[str]) -> Iterator[tuple[str, str, str]]:
    """What is written and changes nothing: the setting, the rule and the cure.

    Args:
        settings: all of them, defaults filled in.
        written: those that somebody wrote.
    """
    for need in NEEDS:
        for name in need.settings if need.refused and not holds(need.where, settings) else ():
            if name in written and settings.get(name) is not None:
                key, values = next((k, v) for k, v in need.where.items() if not _fits(v, settings.get(k)))
                wanted = _words(key, values)
                yield name, f"{name} has no effect with {key} {settings.get(key)}", f"Remove it, or use {wanted}."


def refused(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What cannot be together in a stage's settings, all of them given: the setting, the rule and the cure."""
    for rule in REFUSALS:
        if holds(rule.when, settings):
            yield rule.setting, rule.reason, rule.cure
    yield from _uneven_groups(settings)


def _uneven_groups(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A step has whole groups of answers, all of the same size."""
    if settings.get("stage") in WITHOUT_CRITIC:
        batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        answers = batch * (settings["nproc_per_node"] or 1) * settings["ppo_buffer_size"]
        size = settings["num_generations"]
        if answers % size:
            rule = f"the {answers} answers of a step cannot be dealt out to prompts with {size} each"
            cure = f"Make per device x accumulation x processes x ppo_buffer_size a multiple of {size}, e.g. {size}."
            yield "num_generations", rule, cure


def _words(key: str, values: tuple[Any, ...]) -> str:
    if values in (SET, UNSET):
        return key if values == SET else f"no {key}"
    return f"{key}: {' or '.join(map(str, values))}"
