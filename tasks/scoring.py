"""Perplexity of a model on held-out shards.

One decision: what is summed is the negative log-likelihood of every scored token, in float32 per token and float64
over tokens, and the one division comes last. Means of batch means depend on the batch size; this does not, but for the
rounding of the matrix products: see `score_rows`.

Legend: b rows of a batch, s tokens of its longest row, h hidden size, v vocabulary, n scored tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from tasks.intervals import Array, drawn_ratios
from tasks.measurements import Measure, measure
from tasks.program import ProgramError
from tasks.sequences import IGNORED, TokenizedSequences

if TYPE_CHECKING:
    import torch

LOGITS_PER_BATCH = 1 << 28  # numbers held at once as logits: 1 GB in float32
LOGITS_PER_CHUNK = 1 << 24  # of those, numbers turned into float32 at once


@dataclass(frozen=True)
class RowScore:
    """What one row adds to the perplexity."""

    nll: float
    """Sum of negative log-likelihoods over its scored tokens, in nats."""
    tokens: int
    """Its scored tokens; 0 when no label is left after the shift by one."""
    bytes: int = 0
    """UTF-8 bytes of the text of its scored tokens; 0 where nobody wants to know."""


def perplexity(rows: Iterable[RowScore], count: int | None = None) -> Measure:
    """The perplexity of many rows: exp(sum of NLL / sum of scored tokens).

    Args:
        rows: of one data set, in any order and split; they are what is drawn for the interval.
        count: rows of the data set, where one is scored in several parts.

    Returns:
        With `nll` (sum, nats) and `tokens` beside `value`, `low`, `high` and `rows`.

    Raises:
        ProgramError: `not_finite` for a NaN or infinite sum, `bad_setting` when nothing is scored.

    Example: NLL 2 over 2 tokens and 16 over 8 give exp(18 / 10) = 6.0496. The mean of the rows' perplexities would be
    5.0536, exp of the mean of their means 4.4817.
    """
    scores = list(rows)
    nll, tokens = math.fsum(row.nll for row in scores), sum(row.tokens for row in scores)
    count = len(scores) if count is None else count
    if tokens == 0:
        raise ProgramError(
            "bad_setting", f"none of {len(scores)} rows has a scored token; perplexity needs answers to score."
        )
    if not math.isfinite(nll) or nll / tokens > math.log(1e300):
        raise ProgramError(
            "not_finite", f"the negative log-likelihood of {tokens} tokens sums to {nll}: the model is broken."
        )
    drawn = numpy.exp(drawn_ratios(_values(scores, "nll"), _values(scores, "tokens")))
    return measure(math.exp(nll / tokens), drawn, count, nll=nll, tokens=tokens)


def bits_per_byte(rows: Sequence[RowScore], count: int) -> Measure:
    """Bits that the model needs for a byte of the scored text: comparable across tokenizers, as perplexity is not.

    Control tokens are scored, and have no text. NLL of ln 2 over 4 bytes and 2 ln 2 over 2 bytes give 3 / 6 = 0.5.

    Args:
        rows: of one data set, with `bytes`, some of them above 0.
        count: rows of the data set.
    """
    size = sum(row.bytes for row in rows)
    bits = _values(rows, "nll") / math.log(2)
    drawn = drawn_ratios(bits, _values(rows, "bytes"))
    return measure(math.fsum(bits) / size, drawn, count, bytes=size)


def _values(rows: Sequence[RowScore], name: str) -> Array:
    return numpy.array([getattr(row, name) for row in rows], numpy.float64)


def windows(length: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows in which a text is scored: every token but the first one once, with what stands before it.

    >>> list(windows(10, 4, 2))
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    >>> list(windows(10, 4, 3))
    [(0, 4, 1), (3, 7, 4), (6, 10, 7)]

    Args:
        length: tokens of the text.
        size: most tokens of a window.
        stride: most tokens that a window but the first one scores; less than `size`.

    Yields:
        Where a window begins and ends, and the first token that it scores.
    """
    begin, end, scored = 0, min(size, length), 1
    yield begin, end, scored
    while end < length:
        begin, scored = begin + stride, end
        end = min(begin + size, length)
        yield begin, end, scored


class Shards:
    """Texts of an evaluation set: a tokenize artifact that is not packed.

    Args:
        folder: the artifact, see `tasks.sequences`.
        shape: of its rows; a pair is two texts, one behind the other.
        window: most tokens, and of those most that are scored, see `windows`; None: texts are scored whole.

    Raises:
        ProgramError: `bad_setting` when the rows are packed: their tokens would see each other.
    """

    def __init__(self, folder: Path, shape: str = "chat", window: tuple[int, int] | None = None) -> None:
        sequences = TokenizedSequences(folder)
        together = int((sequences.offsets[1:] - sequences.offsets[:-1]).max(initial=1))
        if together > (2 if shape == "preference" else 1):
            raise ProgramError("bad_setting", f"{folder} holds packed rows; evaluation needs them apart.")
        self._sequences = sequences
        self._pieces: list[tuple[int, int, int]] = []
        self._known: list[int] = []
        """Tokens at the beginning of each piece that an earlier one scores."""
        for row, start, size in zip(sequences.members, sequences.starts, sequences.sizes, strict=True):
            for begin, end, scored in windows(int(size), *window) if window else [(0, int(size), 0)]:
                self._pieces.append((int(row), int(start) + begin, end - begin))
                self._known.append(scored - begin if begin else 0)
        self.shape, self.rows = shape, len(sequences.members) // (2 if shape == "preference" else 1)
        self.lengths: list[int] = [size for _, _, size in self._pieces]

    def __len__(self) -> int:
        return len(self._pieces)

    def good(self) -> list[int]:
        """The texts whose likelihood counts: all, the preferred answer of every pair, or the answers marked as good."""
        if self.shape == "preference":
            return list(range(0, len(self), 2))
        if self.shape == "labelled":
            return [number for number in range(len(self)) if self._sequences.rows.mark(self._pieces[number][0])]
        return list(range(len(self)))

    def take(self, indices: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of texts, in the order of `indices`."""
        found = []
        for index in indices:
            ids, labels = self._sequences.rows.piece(*self._pieces[index])
            known = self._known[index]
            found.append((ids.tolist(), [IGNORED] * known + labels[known:].tolist()))
        return found

    def place(self, index: int) -> tuple[int, int]:
        """The row, counted over all shards, that a text is of, and its first token there."""
        row, start, _ = self._pieces[index]
        return row, start


def score_rows(
    model: Any,
    shards: Shards,
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    sizes: NDArray[numpy.int64] | None = None,
    wanted: Sequence[int] | None = None,
) -> dict[int, RowScore]:
    """Score every text of a data set whose likelihood counts.

    Rows of like length go together, the longest first; padding is on the right and has no influence. The same batch
    size gives the same bits. Batch sizes 1 to 16 gave perplexities within 2e-7 relative of each other in float32 and
    within 9e-4 in bfloat16 (SmolLM2-135M, 625 scored tokens, CPU): matrix products are summed in another order.

    Args:
        model: a causal language model in evaluation mode.
        shards: the rows.
        batch_size: most rows per forward pass; fewer where the logits would need too much memory.
        on_batch: told rows done and rows in all after each batch.
        sizes: [v] bytes of each id, to count those of what is scored.
        wanted: numbers of other texts to score instead.

    Returns:
        Number of the text → its score, in the order of the shards.
    """
    scores: dict[int, RowScore] = {}
    wanted = shards.good() if wanted is None else wanted
    lengths = [shards.lengths[index] for index in wanted]
    for batch in batches(lengths, batch_size, model.config.get_text_config().vocab_size):
        numbers = [wanted[index] for index in batch]
        taken = shards.take(numbers)
        found = score_batch(model, taken)
        if sizes is not None:
            found = [
                replace(score, bytes=int(sizes[[label for label in labels[1:] if label != IGNORED]].sum()))
                for score, (_, labels) in zip(found, taken, strict=True)
            ]
        scores |= zip(numbers, found, strict=True)
        on_batch(len(scores), len(wanted))
    return {index: scores[index] for index in wanted}


def batches(lengths: Sequence[int], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Row numbers of each batch, longest rows first.

    >>> list(batches([3, 9, 9, 1], 2, 100))
    [[1, 2], [0, 3]]
    """
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        full = len(batch) == batch_size or (tokens + lengths[index]) * vocabulary > LOGITS_PER_BATCH
        if batch and full:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def score_batch(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[RowScore]:
    """Scores of a few rows in one forward pass.

    Args:
        model: a causal language model in evaluation mode.
        rows: (input_ids, labels) of each; `labels[i]` is scored with the logits of position i - 1.
    """
    import torch

    size, longest = len(rows), max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(size, longest, dtype=torch.int64)  # [b, s]
    mask = torch.zeros(size, longest, dtype=torch.int64)  # [b, s]
    targets = torch.full((size, longest), IGNORED, dtype=torch.int64)  # [b, s], of the next token
    for row, (ids, labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.as_tensor(ids)
        mask[row, : len(ids)] = 1
        targets[row, : len(ids) - 1] = torch.as_tensor(labels[1:])
    scored = targets != IGNORED  # [b, s]
    counts: list[int] = scored.sum(dim=1).tolist()
    if not any(counts):
        return [RowScore(0.0, 0) for _ in rows]
    nll = _nll(model, input_ids, mask, scored, targets[scored])  # [n] float64
    owners = torch.arange(size).repeat_interleave(torch.tensor(counts))  # [n]
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, owners, nll)
    return [RowScore(total, count) for total, count in zip(sums.tolist(), counts, strict=True)]


def _nll(
    model: Any, input_ids: torch.Tensor, mask: torch.Tensor, scored: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of each target, [n] float64 on the CPU.

    The output head only sees scored positions: prompts and padding are often most of a batch, and the head is most of
    the work of a small model. A hook in front of the head, because what some models do behind it (scaling, capping)
    stays theirs.
    """
    import torch

    device = model.device
    positions = scored.to(device)

    def keep_scored(module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (arguments[0][positions].unsqueeze(0),)  # [b, s, h] → [1, n, h]

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_scored)
    try:
        with torch.inference_mode():
            answer = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
            logits = answer.logits[0]  # [n, v]
            chunk = max(1, LOGITS_PER_CHUNK // logits.shape[-1])
            parts = [
                torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
                for part, wanted in zip(logits.split(chunk), targets.to(device).split(chunk), strict=True)
            ]
            return torch.cat(parts).double().cpu()
    finally:
        hook.remove()
