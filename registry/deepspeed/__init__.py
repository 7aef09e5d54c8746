"""DeepSpeed configs: the ready ones of this folder by name, and those of a person by path.

One decision: what is kept of a config is its content. So a ready config and a copy of it elsewhere are the same
setting, and a changed file is another one. `auto` in a config is what the recipe says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.core import read_text, user_path
from registry.errors import InputError, Problem, did_you_mean, shown

FOLDER = Path(__file__).parent
READY = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
# What the recipe says, and the config key that would say it again.
RECIPE_SAYS = {"optimizer": "learning_rate and weight_decay", "scheduler": "lr_scheduler_type and warmup_ratio"}
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
STAGES = (0, 1, 2, 3)
AUTO = "auto"


def deepspeed_config(wanted: str, where: str = "deepspeed") -> dict[str, Any]:
    """The content of a config.

    Args:
        wanted: name of a ready one, or path of a JSON file.
        where: the setting, for the error.

    Raises:
        InputError: no such name or file, not JSON, or a key that says something else than the recipe.
    """
    if wanted in READY:
        config: dict[str, Any] = json.loads((FOLDER / f"{wanted}.json").read_text(encoding="utf-8"))
        return config
    if not wanted.endswith(".json"):
        rule = f"{shown(wanted)} is neither a ready config nor a .json file"
        raise InputError(Problem(where, rule, did_you_mean(wanted, READY)))
    path = user_path(wanted, where)
    try:
        config = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(Problem(str(path), f"not JSON: {error}", "Mend the file.")) from error
    problems = list(_problems(config, str(path)))
    if problems:
        raise InputError(problems)
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """What is divided among processes: 0 nothing, 1 optimizer state, 2 gradients as well, 3 weights as well."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def zero_only(config: dict[str, Any]) -> bool:
    """Whether a config divides optimizer state, or that and gradients, and says nothing else."""
    return any(config == deepspeed_config(name) for name in ("zero1", "zero2"))


def _problems(config: Any, where: str) -> list[Problem]:
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        return [Problem(where, "not a DeepSpeed config", "A mapping; see registry/deepspeed/zero2.json.")]
    problems = [
        Problem(f"{where}: {key}", f"the recipe says it, with {settings}", "Remove it from the config.")
        for key, settings in RECIPE_SAYS.items()
        if key in config
    ]
    problems += [
        Problem(f"{where}: {key}", f"{shown(config[key])} may say another thing than the recipe", "Write auto.")
        for key in BATCHES
        if config.get(key, AUTO) != AUTO
    ]
    if config.get("fp16", {}).get("enabled", False) not in (False, AUTO):
        problems.append(Problem(f"{where}: fp16", "there is no fp16 training", "Use bf16 in the recipe."))
    if config.get("bf16", {}).get("enabled", AUTO) != AUTO:
        problems.append(Problem(f"{where}: bf16.enabled", "the recipe says it, with bf16", "Write auto."))
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in STAGES or isinstance(stage, bool):
        problems.append(Problem(f"{where}: zero_optimization.stage", f"{shown(stage)} is no stage", "0, 1, 2 or 3."))
    return problems
