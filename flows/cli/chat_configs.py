"""`chat` and `serve` with a config of LLaMA-Factory's `chat` and `api`: a file, flags, or `key=value`.

One decision: such a config answers as it did there, so where it says nothing of it answers are drawn with that
program's own temperature; a model that is named here answers with its most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.cli.old_commands import FLAG, read_config
from registry.chat_settings import ChatSettings, read_chat
from registry.errors import InputError, Problem, shown
from registry.loading import SUFFIXES
from registry.old_configs import DRAWN

USED = ("name", "dataset_dir", "model_name_or_path", "adapter_name_or_path", "finetuning_type", "stage")
ON_ITS_BASE = "model_name_or_path: no effect; an adapter answers on the base that its config names"


def read_words(words: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], ChatSettings]:
    """The models that are named, and what is said about the chat.

    Args:
        words: models, or a config and what is typed behind it.
        overrides: `key=value` each.

    Raises:
        InputError: everything wrong with the settings.
    """
    file = words[0].endswith(SUFFIXES) and Path(words[0]).expanduser().is_file()
    if not file and not any(word.startswith(FLAG) for word in words):
        return list(words), read_chat(overrides)
    if not file and not words[0].startswith(FLAG):
        unknown = next(word for word in words if word.startswith(FLAG))
        raise InputError(Problem(unknown, "no such option", "See --help; settings are given as --set KEY=VALUE."))
    raw, _ = read_config(words)
    if not isinstance(raw, dict):  # a recipe, which means what its newest run made
        return list(words), read_chat(overrides)
    return _models(raw), _settings(raw, overrides)


def _models(raw: dict[str, Any]) -> list[str]:
    named = raw.get("adapter_name_or_path") or raw.get("model_name_or_path")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(named, str):
        rule = f"{shown(named)} is no model"
        raise InputError(
            Problem("model_name_or_path", rule, "Name a folder or a hub id; of several adapters, merge them.")
        )
    if raw.get("stage", "sft") == "rm":
        rule = "a reward model gives scores and no answers"
        raise InputError(Problem("stage", rule, "Use `llamatuner score MODEL FILE`."))
    return [named]


def _settings(raw: dict[str, Any], overrides: Sequence[str]) -> ChatSettings:
    said = {key: value for key, value in raw.items() if key not in USED}
    found = read_chat(overrides, dict(DRAWN) | said if said.get("do_sample", True) else said)
    both = raw.get("adapter_name_or_path") and raw.get("model_name_or_path")
    drawn = ", ".join(f"{key} {shown(value)}" for key, value in found.generation.items())
    notes = (*found.notes, *([ON_ITS_BASE] if both else []), f"answers are written with {drawn}")
    return ChatSettings(found.generation, found.model, notes)
