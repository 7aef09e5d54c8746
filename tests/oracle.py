"""The published tokenizers and golden renderings that some tests compare with; these skip where they are absent."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tasks.template_files import added_tokens

ORACLE = Path(os.environ.get("LLAMATUNER_ORACLE") or Path(__file__).parents[2] / "shared" / "oracle")
_UNPACKED = tempfile.TemporaryDirectory(prefix="llamatuner-oracle-")  # emptied when the tests end
# golden name=tokenizer, where they differ
_OTHER_NAMES = "alpaca=llama2 chatml-qwen2.5=qwen2.5 deepseek-v2.5=deepseek-v2 deepseek-v3=deepseek-v3.1 "
_OTHER_NAMES += "glm-4-0414=glm-4 llama2-chat=llama2 llama3.2=llama3.1 mistral-v0.1=mistral-v1 "
_OTHER_NAMES += "mistral-v0.2=mistral-v1 mistral-v0.3=mistral-v3 phi-3-medium=phi-3 phi-3-mini-first=phi-3 "
_OTHER_NAMES += "phi-3-mini=phi-3 qwen1.5=qwen2.5 qwen3-instruct-2507=qwen3 qwen3-v2=qwen3 qwq-32b=qwen3 "
_OTHER_NAMES += "solar=llama2 vicuna-v1.1=llama2 yi-1.5=yi zephyr=mistral-v1"
TOKENIZERS = dict(pair.split("=") for pair in _OTHER_NAMES.split())


def need_oracle() -> None:
    """Skip the test where the folder is absent."""
    if not (ORACLE / "golden").is_dir():
        pytest.skip(f"the oracle folder {ORACLE} is absent; LLAMATUNER_ORACLE may point to it")


@cache
def tokenizer_folder(name: str) -> Path:
    """A published tokenizer's folder, with its tokenizer.json unpacked."""
    need_oracle()
    folder = Path(_UNPACKED.name) / name
    folder.mkdir()
    for source in (ORACLE / "tokenizers" / name).iterdir():
        data = source.read_bytes()
        content = lzma.decompress(data) if source.suffix == ".xz" else data
        (folder / source.name.removesuffix(".xz")).write_bytes(content)
    return folder


@cache
def template_folder(name: str) -> Path:
    """The same with no more of tokenizer.json than its added tokens, which are all that templates need of it."""
    whole = tokenizer_folder(name)
    folder = Path(shutil.copytree(whole, whole.with_name(f"{name}.template"), ignore=lambda *_: ["tokenizer.json"]))
    added = {"added_tokens": added_tokens(whole / "tokenizer.json")}
    (folder / "tokenizer.json").write_text(json.dumps(added), encoding="utf-8")
    return folder


@cache
def conversations() -> dict[str, dict[str, Any]]:
    """The conversations by id."""
    need_oracle()
    return {row["id"]: row for row in json.loads((ORACLE / "conversations.json").read_text("utf-8"))}


@cache
def golden_rows(name: str) -> list[dict[str, Any]]:
    """The lines of one golden file."""
    need_oracle()
    lines = (ORACLE / "golden" / f"{name}.jsonl").read_text("utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines]


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, which `make demo` fetches; skips the test where it is absent."""
    kept = Path.home() / ".llamatuner" / "artifacts" / "model"
    given = os.environ.get("LLAMATUNER_SMOLLM2")
    folder = Path(given) if given else next(kept.glob("SmolLM2-135M-Instruct-*"), None)
    if folder is None or not (folder / "config.json").is_file():
        pytest.skip("SmolLM2-135M-Instruct is absent; `make demo` fetches it, or LLAMATUNER_SMOLLM2 may point to it")
    return folder
