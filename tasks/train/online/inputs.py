"""Prompts and answers in one line; what they begin with in common is there once, gradients included.

One decision: a micro-batch is one row of tokens without pads, and only attention knows which of them belong together
(`attention`). The system message of a template is there once instead of for every prompt, and a prompt with several
answers once instead of for each. It is the same sum but for rounding, so it is done wherever a model can read it, and a
run always does the same.

Example, answers `x y`, `z` to the prompt `s s a .` and `w` to `s s b c .`; an answer is drawn from what comes before
it, so the last token of a prompt is in the row of its answer::

    line     s s a b c . x y . z . w
    level 1  s s                        look at themselves
    level 2  a, b c                     and at s s
    level 3  . x y, . z, . w            and at s s a, s s a, s s b c

Legend: t tokens of a line, b rows, s tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from tasks.sequences import FEWEST, IGNORED, common
from tasks.train.likelihood import body_of
from tasks.train.online.attention import IN_LINE, Line, make_line


@dataclass(frozen=True)
class Answered:
    """A prompt and the answer that was drawn for it."""

    row: int
    """Number of the prompt in the shards."""
    prompt: list[int]
    answer: list[int]
    """Its terminator included, where it has one."""
    stopped: bool
    """It has one; False when it was cut at `max_new_tokens`."""
    reference: str | None
    """The answer that the data set has."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Inputs:
    """Prompts and answers of a micro-batch."""

    ids: Tensor
    """int64 [1, t], or [b, s] where they do not lie in a line."""
    labels: Tensor
    """int64, of the same shape: the answers' tokens, row by row, `IGNORED` elsewhere."""
    given: dict[str, Tensor]
    """In a line `position_ids` [1, t]; else, where rows are padded on the right, `attention_mask` [b, s]."""
    line: Line | None
    """Who looks at whom."""

    def drawn_from(self) -> Tensor:
        """Bool, of the shape of `ids`: positions from which answers' tokens were drawn, each one ahead of its token."""
        places = torch.zeros_like(self.labels, dtype=torch.bool)
        places[:, :-1] = self.labels[:, 1:] != IGNORED
        return places

    def ends(self) -> Tensor:
        """Bool, of the shape of `ids`: the last token of each answer, found by the answer, never by a pad's id."""
        answered = self.labels != IGNORED
        last = answered.clone()
        last[:, :-1] &= ~answered[:, 1:]
        return last

    def arguments(self, model: Any) -> dict[str, Any]:
        """For the model's forward.

        Raises:
            ValueError: the model does not read lines, and would take all rows for one.
        """
        given = {"input_ids": self.ids, "use_cache": False} | self.given
        if self.line is None:
            return given
        if _config(model)._attn_implementation != IN_LINE:
            raise ValueError("reads_lines is to be asked first")
        # a mask of four dimensions is taken as it is; nobody looks at it
        return given | {"line": self.line, "attention_mask": self.ids.new_ones(1, 1, 1, 1)}


def _config(model: Any) -> Any:
    return body_of(model).config.get_text_config()


def reads_lines(model: Any) -> bool:
    """Let a model read rows that lie in one line; whether it can.

    It can where every layer keeps all keys and values, and asks transformers' registry for PyTorch's attention.
    """
    body, config = body_of(model), _config(model)
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    if not plain or not body._supports_attention_backend or getattr(body, "_is_stateful", False):
        return False
    if config._attn_implementation not in ("sdpa", IN_LINE):
        return False
    config._attn_implementation = IN_LINE
    tried = make_inputs([Answered(0, [0, 0], [0], True, None)] * 2, model.device, True)
    assert tried.line is not None
    with torch.no_grad():
        body(**tried.arguments(model))
    if tried.line.layers == config.num_hidden_layers:
        return True
    config._attn_implementation = "sdpa"
    return False


def make_inputs(answers: Sequence[Answered], device: torch.device, share: bool) -> Inputs:
    """The tokens of a micro-batch.

    Args:
        answers: its rows.
        device: of the model.
        share: they lie in a line, for models that read it.
    """
    if not share:
        return _side_by_side(answers, device)
    ids, positions, levels = list[int](), list[int](), list[list[tuple[list[int], list[int]]]]()

    def lay(rows: Sequence[Sequence[int]], before: Sequence[list[int]]) -> list[list[int]]:
        """Lay rows behind what there is; all places that each has looked at then."""
        found = []
        for row, ahead in zip(rows, before, strict=True):
            own = list(range(len(ids), len(ids) + len(row)))
            ids.extend(row)
            positions.extend(range(len(ahead), len(ahead) + len(row)))
            found.append((ahead, own))
        levels.append(found)
        return [ahead + own for ahead, own in found]

    heads = [tuple(item.prompt[:-1]) for item in answers]
    unique = list(dict.fromkeys(heads))
    start = common(unique) if len(answers) > 1 else 0
    seen = [lay([unique[0][:start]], [[]])[0] if start else []] * len(answers)
    if len(unique) < len(heads) and all(unique) and max(map(len, unique)) - start >= FEWEST:
        each = lay([head[start:] for head in unique], seen[: len(unique)])
        seen = [each[unique.index(head)] for head in heads]
    before = len(ids)
    rests = [(item.prompt[len(ahead) :], item.answer) for item, ahead in zip(answers, seen, strict=True)]
    lay([prompt + answer for prompt, answer in rests], seen)
    labels = [IGNORED] * before + [token for prompt, own in rests for token in [*[IGNORED] * len(prompt), *own]]
    line, places, targets = (torch.tensor([values], device=device) for values in (ids, positions, labels))
    return Inputs(line, targets, {"position_ids": places}, make_line(levels, device))


def _side_by_side(answers: Sequence[Answered], device: torch.device) -> Inputs:
    width = max(map(len, answers))
    rows = [(item.prompt + item.answer, [IGNORED] * len(item.prompt) + item.answer) for item in answers]
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows], device=device)
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows], device=device)
    return Inputs(ids, labels, {} if bool(mask.all()) else {"attention_mask": mask}, None)
