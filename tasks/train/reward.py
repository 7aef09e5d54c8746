"""The reward model: a language model's body with a head that gives one score.

One decision: the score is read at the last trained token, found by position. transformers' own head looks for the last
token that is not the pad token; where the pad token is also the one that ends an answer, that is the token before.

Legend: b rows, s sequence, h hidden size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.program import ProgramError
from tasks.sequences import IGNORED
from tasks.train.reference import unwrapped

SCORE_HEAD = "score"
HEAD_SEED = 7


def load_scoring(folder: str, dtype: torch.dtype, **how: Any) -> Any:
    """Load a model with a score head; a new head where the folder has none.

    A new head is drawn from N(0, 1 / (h + 1)), so that first scores are of size 1; always the same one.

    Args:
        folder: config.json and *.safetensors, of a language model or of a reward model.
        dtype: of the body; the head is float32.
        **how: what the body is loaded with, see `tasks.train.loading`.

    Raises:
        ProgramError: `bad_setting` for an architecture without such a model.

    Source: Stiennon et al. 2020, arXiv:2009.01325, for the size of the head's first weights.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({} if "config" in how else {"num_labels": 1}),
            **how,
        )
    except ValueError as error:
        raise ProgramError("bad_setting", f"stage rm: {error}") from error
    head = getattr(model, SCORE_HEAD, None)
    if not isinstance(head, torch.nn.Linear):
        raise ProgramError(
            "bad_setting",
            f"stage rm: {type(model).__name__} has no linear layer named {SCORE_HEAD}. "
            "Use a decoder model such as Llama, Qwen or Mistral.",
        )
    if any(name.startswith(f"{SCORE_HEAD}.") for name in report["missing_keys"]):
        generator = torch.Generator().manual_seed(HEAD_SEED)
        size = head.weight.shape
        head.weight.data = (torch.randn(size, generator=generator) / math.sqrt(size[1] + 1)).to(head.weight.device)
    head.float()
    model.config.pad_token_id = pad_token(Path(folder), model.config)
    return model


def pad_token(folder: Path, config: Any) -> int:
    """A pad token that ends no answer, so that others who load the model read the score at the right token.

    It is the tokenizer's, else the token that begins a text. Our own training and scoring never look at it.

    Raises:
        ProgramError: `bad_setting` when both of them end an answer.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tokens = {
        token["content"]: int(number) for number, token in named.get("added_tokens_decoder", {}).items()
    } | _added(folder)
    for key in ("pad_token", "bos_token"):
        value = named.get(key)
        number = tokens.get(value.get("content") if isinstance(value, dict) else value)
        if number is not None and number not in ends:
            return number
    if config.bos_token_id is not None and config.bos_token_id not in ends:
        return int(config.bos_token_id)
    raise ProgramError(
        "bad_setting",
        "stage rm: the tokenizer has no pad token beside the one that ends answers, and no BOS. "
        "Name another token as pad_token in tokenizer_config.json.",
    )


def _added(folder: Path) -> dict[str, int]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    return {token["content"]: token["id"] for token in json.loads(file.read_text(encoding="utf-8"))["added_tokens"]}


def answer_scores(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The score of every row, read at its last trained token.

    The head gives a score for every position, and the one wanted is caught on its way out; so the call goes through
    every wrapper, and what transformers picks itself is not used.

    Args:
        model: with a score head, wrapped or not.
        inputs: `input_ids`, `labels`, `attention_mask`, (b, s).

    Returns:
        (b,) float32. A row without a trained token is scored at its first.
    """
    arguments = {name: value for name, value in inputs.items() if name != "labels"}
    trained = inputs["labels"] != IGNORED
    steps = torch.arange(trained.shape[1], device=trained.device)
    last = (trained * steps).argmax(dim=1)
    caught: list[Tensor] = []
    inner = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    hook = getattr(inner, SCORE_HEAD).register_forward_hook(lambda module, given, made: caught.append(made))
    try:
        model(**arguments)
    finally:
        hook.remove()
    scores = caught[0].squeeze(-1).float()  # [b, s]
    return scores[torch.arange(len(last), device=last.device), last]
