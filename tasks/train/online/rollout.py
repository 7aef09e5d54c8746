"""Drawing answers from a policy.

One decision: every answer has random numbers of its own, made from the seed, the step and the place of its prompt in
the step. So an answer does not depend on its batch mates, on padding or on how many processes draw, and a run that is
resumed needs no random state.

Legend: b prompts drawn together, p tokens of the longest prompt, n new tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from tasks.sequences import common
from tasks.train.fast_lora import drawing


@dataclass(frozen=True)
class Sampling:
    """The distribution that answers are drawn from; log-probabilities are taken of the same one."""

    temperature: float = 1.0
    top_k: int = 0
    """Most likely tokens that are drawn from; 0: all."""
    top_p: float = 1.0
    """Smallest set of most likely tokens with this share of the probability is drawn from; 1: all."""

    def logits(self, logits: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Logits of the distribution that is drawn from; −inf for tokens that are not.

        Logits (2, 1, 0), temperature 1, top_k 2: probabilities (0.731059, 0.268941, 0).

        Args:
            logits: [n, v] of the model, any float dtype.
            drawn: [n] tokens that are kept in any case: those whose log-probability is wanted. What was drawn was among
                the likely ones when it was drawn; behind an update it need not be.

        Returns:
            [n, v] float32.
        """
        logits = logits.float() if self.temperature == 1.0 else logits.float() / self.temperature  # else a copy
        if not self.top_k and self.top_p == 1.0:
            return logits
        kept = torch.ones_like(logits, dtype=torch.bool)
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            kept &= logits >= least
        if self.top_p < 1.0:
            ordered, places = torch.where(kept, logits, -torch.inf).sort(descending=True, stable=True)
            shares = ordered.softmax(dim=-1)
            before = shares.cumsum(dim=-1) - shares  # of the tokens ahead of each: the first one is always kept
            kept &= torch.zeros_like(kept).scatter(-1, places, before < self.top_p)
        if drawn is not None:
            kept = kept.scatter(-1, drawn[:, None], True)
        return torch.where(kept, logits, -torch.inf)


def uniforms(seed: int, step: int, places: Sequence[int], n: int) -> Tensor:
    """Random numbers in [0, 1) for answers, the same ones whenever and wherever they are asked for.

    Args:
        seed: of the run.
        step: PPO step.
        places: of the prompts within the step, b.
        n: tokens of each.

    Returns:
        [b, n] float64.
    """
    rows = [numpy.random.default_rng([seed, step, place]).random(n) for place in places]
    return torch.from_numpy(numpy.stack(rows))


def choose(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw a token of each row by the inverse of its distribution function.

    Args:
        logits: [b, v] float32.
        numbers: [b] float64 in [0, 1).

    Returns:
        [b] int64: the first token up to which the probability is more than the number. One of probability 0 is never
        drawn.
    """
    reached = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    wanted = numbers.to(reached.device)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, wanted, right=True).clamp(max=logits.shape[-1] - 1).squeeze(-1)


def draw_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    numbers: Tensor,
    sampling: Sampling,
    stops: frozenset[int],
    pad: int,
    share: bool,
) -> Tensor:
    """Answer every prompt at random, raw: no penalty, no forced length, nothing of the model's generation config.

    Prompts are padded on the left, so that every answer begins at one position; the padding is masked and has no
    position. One that comes several times is read once. It ends when every answer has its terminator.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, b of them; best of similar length.
        numbers: [b, n] float64 in [0, 1), one for each token that may be drawn.
        sampling: what is drawn from.
        stops: ids that end an answer.
        pad: id behind an answer's end, and in front of shorter prompts.
        share: what prompts begin with in common is read once, see `inputs.reads_lines`.

    Returns:
        [b, n] int64 on the processor; `pad` behind the terminator.
    """
    ends = torch.tensor(sorted(stops), device=model.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    answers = torch.full(numbers.shape, pad)
    with torch.no_grad(), drawing(model):
        logits, mask, positions, cache = _read(model, prompts, pad, share)
        for t in range(numbers.shape[1]):
            drawn = torch.where(done, pad, choose(sampling.logits(logits), numbers[:, t]))
            answers[:, t] = drawn.cpu()
            done |= torch.isin(drawn, ends)
            if bool(done.all()):
                break
            # new tokens are all seen: what comes behind a terminator is not read
            mask, positions = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), positions + 1
            found = model(
                input_ids=drawn[:, None],
                attention_mask=mask,
                position_ids=positions,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits, cache = found.logits[:, -1], found.cache
    return answers


def _read(model: Any, prompts: Sequence[Sequence[int]], pad: int, share: bool) -> tuple[Tensor, Tensor, Tensor, Any]:
    """What the model knows behind the prompts: logits [b, v], mask [b, p], position of the last token [b, 1], cache."""
    unique, device = list(dict.fromkeys(map(tuple, prompts))), model.device
    start = common([prompt[:-1] for prompt in unique]) if share and len(unique) > 1 else 0
    cache = None
    if start:
        cache = model(
            input_ids=torch.tensor([unique[0][:start]], device=device), use_cache=True, logits_to_keep=1
        ).cache
        cache.reorder_cache(torch.zeros(len(unique), dtype=torch.int64, device=device))
    lengths = torch.tensor([len(prompt) - start for prompt in unique], device=device)
    longest = int(lengths.max())
    ids = torch.tensor(
        [[*[pad] * (longest - len(prompt) + start), *prompt[start:]] for prompt in unique], device=device
    )
    mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    mask = torch.cat([mask.new_ones(len(unique), start), mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:]
    found = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
    )
    if len(unique) == len(prompts):
        return found.logits[:, -1], mask, positions[:, -1:], found.cache
    rows = torch.tensor([unique.index(tuple(prompt)) for prompt in prompts], device=device)
    found.cache.reorder_cache(rows)
    return found.logits[rows, -1], mask[rows], positions[rows, -1:], found.cache
