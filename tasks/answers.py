"""Answers: what a model says to a few questions, or to the prompts of a data set.

One decision: how many questions go through the model together is fixed here and no setting. In bfloat16 another
batch can tip a choice between two nearly equal tokens; so equal settings give equal answers on a machine of any size.

Legend: b prompts of a batch, p tokens of the longest prompt, n new tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.evaluation_records import GenerationSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH = 8  # questions per forward pass


@dataclass(frozen=True)
class Answer:
    """One question answered."""

    question: str
    answer: str
    stopped: bool
    """The model ended the answer itself; False when it was cut at `max_new_tokens`."""
    tokens: int
    """Tokens of the answer, its terminator not counted."""

    def record(self) -> dict[str, Any]:
        """As it is written."""
        return asdict(self)


@dataclass(frozen=True)
class Chat:
    """What turns questions into ids and ids into answers, for one model."""

    tokenizer: Tokenizer
    """The model's tokenizer.json as it is: truncates nothing, pads nothing."""
    render: Callable[[str], str]
    """Question → text of the prompt, up to where the answer begins."""
    bos: tuple[str, int] | None
    """Text and id of the BOS the tokenizer would put in front; None when it puts none."""
    stops: frozenset[int]
    """Ids that end an answer."""
    pad: int
    """An id to fill up with; any will do, it is masked."""

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        template: str | None = None,
        default_system: str | None = None,
        enable_thinking: bool | None = None,
    ) -> Chat:
        """The chat of a model.

        Args:
            folder: tokenizer.json, tokenizer_config.json, generation_config.json, config.json, chat template.
            template: Jinja text to use instead of the model's own.
            default_system: system message in front of each question; None leaves it to the template.
            enable_thinking: variable of that name for the template; None leaves it to the template.

        Raises:
            InputError: there is no usable template.
        """
        from tasks.template import ChatTemplate
        from tasks.tokens import added_bos, load_tokenizer

        variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        chat_template = ChatTemplate.from_folder(folder, template, variables, default_system)
        tokenizer = load_tokenizer(folder)

        def render(question: str) -> str:
            text: str = chat_template.render([{"role": "user", "content": question}], add_generation_prompt=True)
            return text

        stops = stop_ids(folder, tokenizer, chat_template.terminator)
        return cls(tokenizer, render, added_bos(tokenizer, folder), stops, pad=min(stops, default=0))

    def prompt(self, question: str) -> list[int]:
        """Ids of the prompt of a question, with exactly one BOS where the model has one."""
        text = self.render(question)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos[1], *ids] if self.bos and not text.startswith(self.bos[0]) else ids

    def answer(self, question: str, new: Sequence[int]) -> Answer:
        """The answer in new ids [n], which may go on behind its end."""
        kept, stopped = ended(new, self.stops)
        return Answer(question, self.tokenizer.decode(kept, skip_special_tokens=True), stopped, len(kept))


def ended(new: Sequence[int], stops: frozenset[int]) -> tuple[list[int], bool]:
    """The ids of an answer, without its terminator and what is behind; and whether it has a terminator."""
    end = next((index for index, token in enumerate(new) if token in stops), None)
    return list(new[:end]), end is not None


def stop_ids(folder: Path, tokenizer: Tokenizer, terminator: str | None) -> frozenset[int]:
    """Ids that end an answer: the template's terminator, and every end of sequence the model's files name."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        named = _read(folder / name).get("eos_token_id")
        found |= set(named) if isinstance(named, list) else {named} if named is not None else set()
    eos = _read(folder / "tokenizer_config.json").get("eos_token")
    for token in (eos.get("content") if isinstance(eos, dict) else eos, terminator):
        id = tokenizer.token_to_id(token) if token else None
        found |= {id} if id is not None else set()
    return frozenset(found)


def answer_questions(
    model: Any,
    chat: Chat,
    questions: Sequence[str],
    settings: GenerationSettings,
    batch_size: int = BATCH,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answer every question.

    Args:
        model: a causal language model in evaluation mode.
        chat: prompts and ends.
        questions: each is a conversation of its own.
        settings: how tokens are chosen.
        batch_size: questions per forward pass.
        on_batch: told questions done and questions in all after each batch.
    """
    prompts = [chat.prompt(question) for question in questions]
    new = answer_prompts(model, prompts, chat.stops, chat.pad, settings, batch_size, on_batch)
    return [chat.answer(question, ids) for question, ids in zip(questions, new, strict=True)]


def answer_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    pad: int,
    settings: GenerationSettings,
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """New ids of each prompt, [prompts][<= n]; behind a stop id they mean nothing.

    Prompts of like length go together, the longest first: what needs most memory comes first. In float32 batch sizes
    move no answer, unless two tokens are as good as equally likely.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids; a prompt's place among them is the number its random numbers are made from.
        stops: ids that end an answer.
        pad: id to fill up with.
        settings: how tokens are chosen.
        batch_size: prompts that go through the model together.
        on_batch: told prompts done and prompts in all after each batch.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        new = write_answers(model, [prompts[row] for row in rows], stops, pad, settings, rows)
        found |= zip(rows, new, strict=True)
        on_batch(len(found), len(prompts))
    return [found[row] for row in range(len(prompts))]


def generate(
    model: Any, prompts: Sequence[Sequence[int]], stops: frozenset[int], pad: int, max_new_tokens: int
) -> list[list[int]]:
    """New ids of each prompt, greedily, as `write_answers` gives them."""
    greedy = GenerationSettings(max_new_tokens=max_new_tokens)
    return write_answers(model, prompts, stops, pad, greedy, range(len(prompts)))


def write_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    pad: int,
    settings: GenerationSettings,
    rows: Sequence[int],
    watch: Callable[[int], bool] | None = None,
) -> list[list[int]]:
    """New ids of each prompt, [b][<= n]; behind a stop id they mean nothing.

    Prompts are padded on the left, so that every answer begins at one position, and the padding is masked: padded on
    the right, an answer would continue from padding.

    Args:
        model, prompts, stops, pad, settings: as for `answer_prompts`.
        rows: [b] the number of each prompt.
        watch: of a single prompt, told each new id when it is chosen; true ends the answer. With beams an id it is told
            may be none of the answer's.
    """
    import torch

    from tasks.decoding import make_config, make_processors, make_watcher

    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)  # [b, p]
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)  # [b, p]
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.as_tensor(ids)
        mask[row, longest - len(ids) :] = 1
    config = make_config(settings, stops, pad)
    # What the folder's generation_config says of sampling and penalties would fill up whatever is not set there.
    model.generation_config = config
    with torch.inference_mode():
        whole = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=make_processors(settings, list(map(len, prompts)), rows),
            stopping_criteria=make_watcher(watch),
        )
    new: list[list[int]] = whole[:, longest:].tolist()
    return new


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values
