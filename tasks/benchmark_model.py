"""The model as lm-eval asks it: Hugging Face's, with progress, and chats drawn by the template that goes with it.

One decision: everything that decides a number is lm-eval's (`HFLM`); here is only what it reports and which text a chat
becomes. A template that takes no system message gets none, as in lm-eval, and it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from registry.errors import InputError
from tasks.template import ChatTemplate

Report = Callable[[int, int], None]
"""Told what is done and what there is in all."""
STEPS = 100  # reports for each kind of request


class Counter(CacheHook):
    """Counts the requests that are done: lm-eval hands each one to this hook, which it keeps for a cache of answers."""

    def __init__(self, report: Report) -> None:
        super().__init__(None)
        self.report, self.done, self.total = report, 0, 0

    def begin(self, total: int) -> None:
        """Requests of another kind begin."""
        self.done, self.total = 0, total

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """One more is done."""
        self.done += 1
        if self.done * STEPS // self.total > (self.done - 1) * STEPS // self.total:
            self.report(self.done, self.total)


class AskedModel(HFLM):
    """A loaded model for lm-eval.

    Args:
        model: a causal language model in evaluation mode, perhaps with an adapter.
        tokenizer: transformers' fast tokenizer.
        batch_size: requests for each forward pass.
        template: of chats; None: there are none.
        report: told how many requests are done.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, template: ChatTemplate | None, report: Report):
        # in bfloat16 log-likelihoods are multiples of 1/32 to 1/4: choices tie, and of those the first one wins
        precise = {"softmax_dtype": "float32"}
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal", **precise)
        self.template, self.counter = template, Counter(report)
        self.without_system = 0
        """Chats whose system message the template refused."""
        self.set_cache_hook(self.counter)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval says."""
        self.counter.begin(len(requests))
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As lm-eval says."""
        self.counter.begin(len(requests))
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As lm-eval says."""
        self.counter.begin(len(requests))
        found: list[str] = super().generate_until(requests, disable_tqdm)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text; without generation prompt it ends inside the last message, which the model goes on with."""
        assert self.template is not None
        try:
            text = self.template.render(chat_history, add_generation_prompt=add_generation_prompt)
        except InputError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = self.template.render(rest, add_generation_prompt=add_generation_prompt)
            self.without_system += 1
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]


def fast_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder as its tokenizer.json has it; nothing is built anew, no code is run."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
