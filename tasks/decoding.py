"""How the next token of an answer is chosen: the search, the penalty for repetition, the draw.

One decision: an answer depends on its prompt, the settings and the number of its row alone. Padding is no repetition,
and every row has random numbers of its own, made from the seed and its number; so neither the size nor the order of
batches moves an answer.

Legend: b rows of a batch, p tokens of the longest prompt, n new tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from registry.evaluation_records import GenerationSettings
from tasks.train.online.rollout import Sampling, choose


def make_config(settings: GenerationSettings, stops: frozenset[int], pad: int) -> GenerationConfig:
    """What transformers' `generate` is told. It never draws by itself: see `make_processors`."""
    return GenerationConfig(
        do_sample=False,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        repetition_penalty=1.0,
        early_stopping=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        use_cache=True,
    )


def make_processors(settings: GenerationSettings, lengths: Sequence[int], rows: Sequence[int]) -> LogitsProcessorList:
    """What changes logits [b, v] before a token is chosen, in transformers' order: the penalty, then the draw.

    Args:
        settings: of generation.
        lengths: [b] tokens of each prompt; shorter ones are padded on the left.
        rows: [b] numbers that each row's random numbers are made from.
    """
    found = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        # asked for by `repetition_penalty=`, it would take the padding, mostly the terminator, for repeated
        padding = torch.tensor([max(lengths) - length for length in lengths])
        padding = padding.repeat_interleave(settings.num_beams)
        found.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty, prompt_ignore_length=padding))
    if settings.do_sample:
        found.append(_Draw(settings, max(lengths), rows))
    return found


def make_watcher(watch: Callable[[int], bool] | None) -> StoppingCriteriaList | None:
    """What tells of each new token of one prompt, and ends its answer when told to."""
    return None if watch is None else StoppingCriteriaList([_Watcher(watch)])


class _Watcher(StoppingCriteria):
    def __init__(self, watch: Callable[[int], bool]) -> None:
        self.watch = watch

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        ended = self.watch(int(input_ids[0, -1]))
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)


class _Draw(LogitsProcessor):
    """Draws a token and leaves no other to choose, so that the greedy choice behind it is the drawn one."""

    supports_continuous_batching = False

    def __init__(self, settings: GenerationSettings, begin: int, rows: Sequence[int]) -> None:
        self.sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
        self.begin = begin  # p
        randoms = (numpy.random.default_rng([settings.seed, row]) for row in rows)
        self.numbers = torch.from_numpy(numpy.stack([random.random(settings.max_new_tokens) for random in randoms]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = choose(self.sampling.logits(scores), self.numbers[:, input_ids.shape[1] - self.begin])
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)
