"""Runs of stage ppo on a tiny model, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.records import TrainSettings
from tasks.program import Events, Spec
from tasks.train.online.program import work
from tasks.training import DEFAULT_READING
from tests.tiny import read_lines, write_shards, write_spec

PROMPT_COUNT = 12
CODE = """
def low(completion_ids, **given):
    return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]


def nothing(prompts, completions):
    return [0.0 for _ in completions]


def too_few(prompts):
    return [1.0]


def broken(prompts):
    return [float("nan") for _ in prompts]
"""
LOW = "rewards.py:low"


def prompts(count: int = PROMPT_COUNT) -> list[dict[str, list[int]]]:
    """Prompts of unequal length, nothing of which is trained on."""
    texts = [[*f"{'why ' * (number % 4)}question {number}?".encode(), 259] for number in range(count)]
    return [{"input_ids": ids, "labels": [-100] * len(ids)} for ids in texts]


def make_spec(folder: Path, inputs: dict[str, Path], **fields: Any) -> Path:
    """A spec; `inputs` may lack the shards, and `fields` the rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = folder.parent / "prompts"
    if not shards.exists():
        write_shards(shards, prompts(), "prompt", [f"answer {number}" for number in range(PROMPT_COUNT)])
    (folder / "rewards.py").write_text(CODE)
    runtime: dict[str, Any] = {"logging_steps": 1, "save_steps": 2, "save_total_limit": 2, "sample_steps": 2}
    runtime |= {name: fields.pop(name) for name in ("save_steps", "micro_batch", "sample_steps") if name in fields}
    settings: dict[str, Any] = {"stage": "ppo", "max_new_tokens": 8, "per_device_train_batch_size": 4, "max_steps": 4}
    settings |= {"learning_rate": 1e-2, "kl_coef": 0.05, "lr_scheduler_type": "constant", "lora_rank": 4}
    if not any("reward" in name for name in (*inputs, *fields)):
        settings["reward_funcs"] = (LOW,)
    settings["reward_model"] = "rm" if any("reward" in name for name in inputs) else None
    train = TrainSettings(**(settings | fields)).identity()
    files = {name: str(folder / "rewards.py") for name in train["reward_funcs"] if ":" in name}
    identity = {"train": train, "packing": False, "base_digest": "base-0", "template": None}
    identity |= {"reading": DEFAULT_READING} if "reward_model" in inputs else {}
    runtime |= {"base_name": "tiny", "reward_files": files}
    return write_spec(folder, identity, {"shards": shards} | inputs, runtime)


def train(folder: Path, inputs: dict[str, Path], **fields: Any) -> list[dict[str, Any]]:
    """Make the steps that are not made yet; the lines of all."""
    spec = Spec.read(make_spec(folder, inputs, **fields))
    work(spec, Events(spec.events))
    return lines(folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The line of every step, without what was measured by a clock."""
    measured = ("rollout_tokens_per_second", "update_tokens_per_second", "samples_per_second", "peak_memory_gib")
    found = read_lines(folder / "output" / "report" / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in measured} for line in found]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of the artifact but those of report/."""
    return {path.name: path.read_bytes() for path in sorted((folder / "output").iterdir()) if path.is_file()}


def numbers(folder: Path) -> dict[str, Any]:
    """What train.json says."""
    found: dict[str, Any] = json.loads((folder / "output" / "train.json").read_text())
    return found
