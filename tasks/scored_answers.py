"""Answers as a reward model of any tokenizer reads them.

One decision: a reward model reads what people and models said, not what another tokenizer made of it: the messages of
the fetched rows, the answer behind them, its own chat template and its own tokenizer, as with the pairs it was trained
on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.canonical import Row, read_table, to_rows
from tasks.fetch import ROWS
from tasks.model import longest_sequence
from tasks.reading import BadRow
from tasks.render import RowRenderer
from tasks.shards import RowFitter
from tasks.tokens import TOKENIZERS, Text


class Given(NamedTuple):
    """An answer to a prompt."""

    place: Any
    """Of the prompt."""
    name: str
    """Whose it is."""
    text: str


class Tokenized(NamedTuple):
    """A conversation as the reward model reads it."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


class TokenizedTexts:
    """A list of texts as `tasks.rewards.Texts`."""

    def __init__(self, texts: Sequence[Tokenized]) -> None:
        self.texts, self.lengths = texts, [len(text.ids) for text in texts]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of texts, in the order of `indices`."""
        return [(list(self.texts[index].ids), list(self.texts[index].labels)) for index in indices]


def read_prompts(folder: Path) -> dict[tuple[int, int, int], Row]:
    """The canonical rows, shape `prompt`, of a fetch artifact, by the numbers of their data set, file and row."""
    found = {}
    for chunk in json.loads((folder / f"{ROWS}.json").read_text(encoding="utf-8")):
        for row in to_rows(read_table(folder / chunk["path"]), "prompt"):
            found[chunk["source"], chunk["file"], row["row"]] = row
    return found


class AnswerReader:
    """Reads answers behind their prompts, as a reward model reads pairs.

    Args:
        folder: of the reward model.
        settings: `tasks.training.DEFAULT_READING`, other values.

    Raises:
        InputError: the model has no usable chat template.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        how = {"mask_history": False, "train_on_prompt": False}  # of answers before, which are the prompt's
        self._renderer = RowRenderer({"shape": "labelled", **how, **settings}, folder)
        limits = {"cutoff_len": longest_sequence(folder), "overlong": "drop"}
        self._fitter = RowFitter.make(limits, folder, self._renderer.meta(), library=TOKENIZERS)

    def read(
        self, given: Sequence[Given], prompts: Mapping[Any, Row]
    ) -> tuple[dict[tuple[Any, str], Tokenized], dict[tuple[Any, str], BadRow], Counter[str]]:
        """Answers behind their prompts.

        Args:
            given: the answers.
            prompts: canonical rows, shape `prompt`, by place.

        Returns:
            What can be scored, why the others cannot, and what the template drops of how many; by place and name.
        """
        refused: dict[tuple[Any, str], BadRow] = {}
        rendered: dict[tuple[Any, str], Text] = {}
        lost = Counter[str]()
        for place, name, text in given:
            prompt = prompts[place]
            completion = [{"role": "assistant", "content": text}]
            found = self._renderer.render(
                {"prompt": prompt["prompt"], "tools": prompt["tools"], "completion": completion}
            )
            if isinstance(found, BadRow):
                refused[place, name] = found
                continue
            rendered[place, name] = Text(found[0].text, found[0].spans, found[0].typed)
            lost.update(found[0].lost)
        texts = {}
        for key, fitted in zip(rendered, self._fit(list(rendered.values())), strict=True):
            if isinstance(fitted, BadRow):
                refused[key] = fitted
            else:
                texts[key] = fitted
        return texts, refused, lost

    def _fit(self, texts: list[Text]) -> list[Tokenized | BadRow]:
        batch, _, unfit = self._fitter.fit(texts)
        labels, ids = batch.labels().tolist(), batch.ids.tolist()
        bounds = [slice(int(start), int(end)) for start, end in zip(batch.offsets, batch.offsets[1:], strict=False)]
        return [
            Tokenized(tuple(ids[bound]), tuple(labels[bound])) if bad is None else bad
            for bound, bad in zip(bounds, unfit, strict=True)
        ]


def load_reward_model(folder: Path, bf16: bool) -> Any:
    """A reward model with its score head, for scoring, on the GPU where there is one."""
    import torch

    from tasks.train.loading import load_base

    model = load_base(str(folder), torch.bfloat16 if bf16 else torch.float32, score=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
