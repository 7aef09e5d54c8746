"""The chat template of a model folder, and the tokens it knows.

One decision: only small parts of tokenizer.json are read; its vocabulary can take a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry.core import read_text
from registry.errors import InputError, Problem

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def token_text(value: Any) -> str:
    """The text of a special token as tokenizer_config.json writes it: a string, or an object with `content`."""
    token = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(token, str):
        raise InputError(Problem("tokenizer_config.json", f"{value!r} is not a special token", "Copy the model again."))
    return token


def added_tokens(path: Path) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, without reading its vocabulary: that takes a second where it is large."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r'"added_tokens"\s*:\s*', text)
    if found is None:
        return []
    try:
        return json.JSONDecoder().raw_decode(text, found.end())[0]
    except ValueError as error:
        raise InputError(Problem(str(path), f"is not JSON: {error}")) from error


def folder_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """File and text of a folder's own template."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return str(path), read_text(path)
    path, found = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not found:
        cure = "Choose one with `template:`, e.g. chatml, or use the model's chat variant."
        raise InputError(Problem(str(path), "the model has no chat template", cure))
    return str(path), found
