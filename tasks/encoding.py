"""Text to token ids, where control tokens that somebody typed stay text.

One decision: what happens between real control tokens is left to the tokenizer. For a text with typed ones a copy of it
is used that knows no control token; each real one in the text is replaced by a private-use character that the copy
knows as an ordinary added token with the same flags. So white space, prefixes and borders are treated as ever, and no
id of a control token can come from anything but a real one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tasks.control_text import Scanner

STAND_INS = range(0x10F000, 0x10FFFE)  # private use, and hardly used: one character for each real control token met
RENAMED = "\U0010fffe"  # no text has it: begins the names of control tokens in the copy's vocabulary
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


class Encoder:
    """Encodes rendered rows.

    Args:
        tokenizer: of the model, with neither truncation nor padding.
        control_tokens: texts of its special added tokens.
    """

    def __init__(self, tokenizer: Tokenizer, control_tokens: frozenset[str]) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = control_tokens
        self._added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        self._scanner = Scanner(frozenset(self._added) | control_tokens)
        self._stand_ins: dict[str, str] = {}

    def encode(self, text: str, typed: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and where in the text each stands; no special tokens are added.

        Without typed ranges this is `tokenizer.encode(text, add_special_tokens=False)`.

        Args:
            text: a rendered row.
            typed: character ranges of control tokens that are plain text, in order (`Rendered.typed`).

        Returns:
            ids [n] and offsets [n], characters [start, end) of `text`.
        """
        if typed:
            return self.encode_apart(text, typed)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_apart(self, text: str, typed: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode` by way of the copy, whether or not there are typed ranges."""
        if any(stand_in in text for stand_in in self._stand_ins.values()):
            return Encoder(self.tokenizer, self.control_tokens).encode_apart(text, typed)  # which chooses others
        pieces: list[str] = []
        originals: list[int] = []  # the place in `text` of each character given to the copy
        position = 0
        for start, end in self._real(text, typed):
            pieces += [text[position:start], self._stand_in(text[start:end], text)]
            originals += range(position, start + 1)
            position = end
        originals += range(position, len(text) + 1)
        copy, original_ids = self._copy
        encoding = copy.encode("".join([*pieces, text[position:]]), add_special_tokens=False)
        ids = [original_ids.get(token, token) for token in encoding.ids]
        offsets = [(originals[start], originals[end]) for start, end in encoding.offsets]
        return ids, offsets

    def _real(self, text: str, typed: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ranges of the control tokens that are real: those that touch no typed range."""
        masked, position = [], 0
        for start, end in typed:
            masked += [text[position:start], "\0" * (end - start)]
            position = end
        hidden = "".join([*masked, text[position:]])
        return [(start, end) for start, end in self._scanner.find(hidden) if hidden[start:end] in self.control_tokens]

    def _stand_in(self, token: str, text: str) -> str:
        """The character that stands for a control token in the copy, and is not in the text."""
        if token in self._stand_ins:
            return self._stand_ins[token]
        taken = {*self._stand_ins.values(), *text}
        stand_in = next(chr(code) for code in STAND_INS if chr(code) not in taken)
        flags = {name: getattr(self._added[token], name) for name in FLAGS} if token in self._added else {}
        copy, original_ids = self._copy
        copy.add_tokens([AddedToken(stand_in, **{"normalized": False, **flags}, special=False)])
        original_ids[_id(copy, stand_in)] = _id(self.tokenizer, token)
        self._stand_ins[token] = stand_in
        return stand_in

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer without control tokens, and its ids that are others in the original: added tokens move up."""
        copy = Tokenizer.from_str(json.dumps(_without(json.loads(self.tokenizer.to_str()), self.control_tokens)))
        added = copy.get_added_tokens_decoder().items()
        return copy, {number: _id(self.tokenizer, token.content) for number, token in added}


def _id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"{token!r} is no token of the tokenizer")
    return number


def _without(state: dict[str, Any], tokens: frozenset[str]) -> dict[str, Any]:
    """A tokenizer's JSON without these added tokens, and with a model that cannot make them of their letters.

    Their places in the vocabulary stay, under names that no text has, so that every other id is what it was.
    """

    def name(piece: str) -> str:
        return RENAMED + piece if piece in tokens else piece

    model = dict(state["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name(piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[name(piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = name(model["unk_token"])
    if "merges" in model:
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [merge for merge in merges if not tokens.intersection((*merge, "".join(merge)))]
    added = [token for token in state["added_tokens"] if token["content"] not in tokens]
    return {**state, "added_tokens": added, "post_processor": None, "model": model}
