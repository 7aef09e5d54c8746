"""A reward model with a tokenizer of its own: it reads what was said, not the policy's tokens.

One decision: the prompt's messages come from the fetched rows and the answer is put behind them as text, in the reward
model's own template. So an answer that was cut off is read as one that ends there; `missing_eos_penalty` is for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.program import ProgramError
from tasks.rewards import score_texts
from tasks.scored_answers import AnswerReader, Given, TokenizedTexts, read_prompts
from tasks.sequences import TokenizedSequences

WHO = "policy"


class Reader:
    """Scores answers by their texts.

    Args:
        model: with a score head, frozen, in evaluation mode.
        folder: of the model: its tokenizer and template.
        reading: how it reads conversations, see `tasks.training.DEFAULT_READING`.
        rows: the fetch artifact that the prompts were made of.
        shards: the tokenized prompts.
    """

    def __init__(self, model: Any, folder: str, reading: Mapping[str, Any], rows: str, shards: str) -> None:
        self.model, self._reader = model, AnswerReader(Path(folder), reading)
        self._prompts, self._sequences = read_prompts(Path(rows)), TokenizedSequences(Path(shards))
        read = self._sequences.rows
        places = zip(read.sources().tolist(), read.files().tolist(), read.numbers().tolist(), strict=True)
        self._places = list(places)

    def __call__(self, rows: Sequence[int], answers: Sequence[str]) -> list[float]:
        """The scores of answers, which go through the model together.

        Args:
            rows: numbers of their prompts in the shards.
            answers: their texts.

        Raises:
            ProgramError: `bad_setting` for an answer that it cannot read.
        """
        places = [self._places[self._sequences.rows_of(row)[0]] for row in rows]
        prompts = {number: self._prompts[place] for number, place in enumerate(places)}
        given = [Given(number, WHO, text) for number, text in enumerate(answers)]
        texts, refused, _ = self._reader.read(given, prompts)
        if refused:
            bad = next(iter(refused.values()))
            raise ProgramError(
                "bad_setting",
                f"reward_model: it cannot read {len(refused)} of {len(answers)} answers: {bad.reason}: {bad.detail}. "
                "Lower cutoff_len or max_new_tokens where they are too long for it.",
            )
        found = score_texts(self.model, TokenizedTexts([texts[each.place, WHO] for each in given]), len(given))
        return [text.score for text in found]
