"""Texts and spans to token ids and labels, many rows at once.

One decision: nothing per token is a Python object. `fastokens` gives ids in one buffer; the bytes that each id stands
for, summed up, say where every token begins; where a sum does not come out at the length of its text, the row is done
by `tokenizers`, which knows. `TokenBatch` carries rows between the steps of this: ids flat, rows by offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import is_normalized

import numpy
import orjson
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors

from registry.errors import InputError, Problem
from tasks.encoding import Encoder
from tasks.jsonlines import read_object
from tasks.program import ProgramError
from tasks.sequences import IGNORED

Ids = NDArray[numpy.int32]
Offsets = NDArray[numpy.int64]
CACHE_BYTES = 64 << 20  # of text that fastokens remembers: system prompts and headers come again in every row
FASTOKENS, TOKENIZERS = "fastokens", "tokenizers"
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
NOT_FAST = "not_fast"  # kind of failure after which `tokenizers` does the work


class Text(NamedTuple):
    """One text to encode."""

    text: str
    spans: Sequence[int]
    """Flat byte offsets `[start, end, start, end, …]` of what is trained."""
    typed: Sequence[int] = ()
    """Flat byte offsets of control tokens that somebody typed: they stay text."""


@dataclass(frozen=True)
class TokenBatch:
    """Encoded rows; row i has tokens `offsets[i]` to `offsets[i + 1]`."""

    ids: Ids
    """[tokens] token ids."""
    trained: NDArray[numpy.bool_]
    """[tokens] whether a token is trained."""
    offsets: Offsets
    """[rows + 1]"""

    def lengths(self) -> Offsets:
        """[rows] tokens of each."""
        return numpy.diff(self.offsets)

    def trained_tokens(self) -> Offsets:
        """[rows] tokens that are predicted and trained: the first of a row is never predicted."""
        counts = numpy.concatenate([[0], numpy.cumsum(self.trained)])
        first = self.offsets[:-1] + (self.lengths() > 0)
        return counts[self.offsets[1:]] - counts[first]

    def labels(self) -> Ids:
        """[tokens] the id where trained, else -100."""
        return numpy.where(self.trained, self.ids, numpy.int32(IGNORED))

    def select(self, kept: NDArray[numpy.bool_]) -> TokenBatch:
        """The rows that are kept."""
        mask = numpy.repeat(kept, self.lengths())
        return TokenBatch(self.ids[mask], self.trained[mask], _offsets(self.lengths()[kept]))

    def cut(self, lengths: Offsets) -> TokenBatch:
        """Each row cut at its end to at most so many tokens."""
        wanted = numpy.minimum(lengths, self.lengths())
        position = numpy.arange(len(self.ids)) - numpy.repeat(self.offsets[:-1], self.lengths())
        mask = position < numpy.repeat(wanted, self.lengths())
        return TokenBatch(self.ids[mask], self.trained[mask], _offsets(wanted))


def _offsets(lengths: Offsets) -> Offsets:
    return numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int64)


def join(batches: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> TokenBatch:
    """Rows of ids and marks as one batch."""
    lengths = numpy.array([len(ids) for ids, _ in batches], numpy.int64)
    ids = numpy.fromiter((token for row, _ in batches for token in row), numpy.int32)
    trained = numpy.fromiter((mark for _, marks in batches for mark in marks), numpy.bool_)
    return TokenBatch(ids, trained, _offsets(lengths))


class TextEncoder:
    """Encodes texts with the tokenizer of a model folder.

    Args:
        folder: holds tokenizer.json and tokenizer_config.json.
        control_tokens: added tokens marked special, as the chat template knows them.
        library: `fastokens`, or `tokenizers` for what the other does not do.

    Raises:
        InputError: tokenizer.json is not one.
        ProgramError: `not_fast`: `fastokens` does not do for this tokenizer.
    """

    def __init__(self, folder: Path, control_tokens: frozenset[str], library: str) -> None:
        self.folder, self.control_tokens, self.library = folder, control_tokens, library
        self.fast: Any = None
        if library == FASTOKENS:
            loaded = load_fastokens(folder)
            if loaded is None:
                raise ProgramError(NOT_FAST, "the tokenizer is not one that fastokens does")
            self.fast, self.bytes_of_ids = loaded

    @property
    def tokenizer(self) -> Tokenizer:
        """The reference: `tokenizers`, without the BOS that it puts in front by itself."""
        return self._loaded[0]

    @cached_property
    def _loaded(self) -> tuple[Tokenizer, tuple[str, int] | None]:
        tokenizer = load_tokenizer(self.folder)
        bos = added_bos(tokenizer, self.folder)
        # a post-processor may also move where tokens begin behind their white space, and with it what is trained
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return tokenizer, bos

    @cached_property
    def reference(self) -> Encoder:
        """Encodes row by row, with typed control tokens as text."""
        return Encoder(self.tokenizer, self.control_tokens)

    @property
    def bos(self) -> tuple[str, int] | None:
        """Text and id of the BOS that the tokenizer puts in front by itself."""
        return self._loaded[1]

    def writes_bos(self, ids: Sequence[int]) -> bool:
        """Whether a BOS is put in front of a text that has these ids: told by ids, a typed BOS is none."""
        return self.bos is not None and (not ids or ids[0] != self.bos[1])

    def encode(self, texts: Sequence[Text]) -> TokenBatch:
        """Ids and marks of texts, with exactly one BOS where the tokenizer or the template writes one."""
        batch = self._encode_fast(texts) if self.fast is not None else join([self._encode_one(text) for text in texts])
        return self._with_bos(batch)

    def agrees(self, texts: Sequence[Text]) -> bool:
        """Whether both libraries give the same for these texts."""
        batch, other = self._encode_fast(texts), join([self._encode_one(text) for text in texts])
        return (
            numpy.array_equal(batch.ids, other.ids)
            and numpy.array_equal(batch.offsets, other.offsets)
            and numpy.array_equal(batch.trained, other.trained)
        )

    def _encode_fast(self, texts: Sequence[Text]) -> TokenBatch:
        assert self.fast is not None
        buffers = self.fast.encode_batch_flat([text.text for text in texts], add_special_tokens=False)
        ids = numpy.frombuffer(buffers[0], numpy.uint32).astype(numpy.int32)
        offsets = numpy.frombuffer(buffers[1], numpy.uint64).astype(numpy.int64)
        ends = numpy.concatenate([[0], numpy.cumsum(self.bytes_of_ids[ids])])
        sizes = numpy.array([len(t.text) if t.text.isascii() else len(t.text.encode()) for t in texts], numpy.int64)
        unsure = numpy.diff(ends[offsets]) != sizes
        unsure |= numpy.array([bool(text.typed) or not is_normalized("NFC", text.text) for text in texts], numpy.bool_)
        trained = _mark(ends, offsets, [text.spans for text in texts])
        batch = TokenBatch(ids, trained, offsets)
        return self._replaced(texts, batch, numpy.flatnonzero(unsure)) if unsure.any() else batch

    def _replaced(self, texts: Sequence[Text], batch: TokenBatch, rows: NDArray[numpy.int64]) -> TokenBatch:
        """The batch with some rows done by the reference."""
        wanted = set(rows.tolist())
        done: list[tuple[Any, Any]] = []
        for number, text in enumerate(texts):
            span = slice(int(batch.offsets[number]), int(batch.offsets[number + 1]))
            done.append(self._encode_one(text) if number in wanted else (batch.ids[span], batch.trained[span]))
        return TokenBatch(
            numpy.concatenate([numpy.asarray(ids, numpy.int32) for ids, _ in done]),
            numpy.concatenate([numpy.asarray(marks, numpy.bool_) for _, marks in done]),
            _offsets(numpy.array([len(ids) for ids, _ in done], numpy.int64)),
        )

    def _encode_one(self, text: Text) -> tuple[list[int], list[bool]]:
        """Ids and marks of one text, by the reference.

        A token that begins before a span is not in it; one that begins inside and ends beyond is. Text `a b c`, one
        token per letter with its space, span of ` b`: `[False, True, False]`.
        """
        typed = characters(text.text, text.typed)
        ids, offsets = self.reference.encode(text.text, list(zip(typed[::2], typed[1::2], strict=True)))
        borders = characters(text.text, text.spans)
        spans, current, marks = list(zip(borders[::2], borders[1::2], strict=True)), 0, []
        for start, end in offsets:
            while current < len(spans) and spans[current][1] <= start:
                current += 1
            marks.append(current < len(spans) and spans[current][0] <= start < end)
        return list(ids), marks

    def _with_bos(self, batch: TokenBatch) -> TokenBatch:
        bos = self.bos
        if bos is None:
            return batch
        # told by ids and not by text: a BOS that somebody typed at the start is no BOS
        first = numpy.append(batch.ids, numpy.int32(-1))[batch.offsets[:-1]]
        lacking = (first != bos[1]) | (batch.lengths() == 0)
        if not lacking.any():
            return batch
        places = batch.offsets[:-1][lacking]
        ids = numpy.insert(batch.ids, places, bos[1])
        return TokenBatch(ids, numpy.insert(batch.trained, places, False), _offsets(batch.lengths() + lacking))


def with_end(batch: TokenBatch, token: int) -> TokenBatch:
    """Every row with one more, trained, token at its end."""
    ends = batch.offsets[1:]
    return TokenBatch(
        numpy.insert(batch.ids, ends, token), numpy.insert(batch.trained, ends, True), _offsets(batch.lengths() + 1)
    )


def _mark(ends: Offsets, offsets: Offsets, spans: Sequence[Sequence[int]]) -> NDArray[numpy.bool_]:
    """Which tokens begin inside a span.

    Args:
        ends: [tokens + 1] byte at which each token begins, over all texts.
        offsets: [texts + 1] token at which each text begins.
        spans: flat byte offsets in each text.
    """
    bases = ends[offsets[:-1]]
    counts = [len(borders) for borders in spans]
    flat = numpy.fromiter((border for borders in spans for border in borders), numpy.int64, sum(counts))
    places = numpy.searchsorted(ends[:-1], flat + numpy.repeat(bases, counts), side="left")
    change = numpy.zeros(len(ends), numpy.int8)
    numpy.add.at(change, places[::2], 1)
    numpy.add.at(change, places[1::2], -1)
    return numpy.cumsum(change[:-1], dtype=numpy.int8) > 0


def characters(text: str, borders: Sequence[int]) -> list[int]:
    """Byte offsets as character offsets."""
    if text.isascii() or not borders:
        return list(borders)
    data = text.encode("utf-8")
    return [len(data[:border].decode("utf-8")) for border in borders]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The `tokenizers` tokenizer of a folder, neither cutting nor padding nor leaving anything to chance.

    Raises:
        InputError: tokenizer.json is not one.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        problem = Problem(str(folder / "tokenizer.json"), f"not a tokenizer: {error}", "Copy the model again.")
        raise InputError(problem) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # BPE dropout: the same text would give other ids each time
    return tokenizer


def load_fastokens(folder: Path) -> tuple[Any, NDArray[numpy.int64]] | None:
    """The same tokenizer in `fastokens`, and the bytes each id stands for; None where it does not do for it."""
    import fastokens

    data = orjson.loads((folder / "tokenizer.json").read_bytes())
    if not is_byte_level(data):
        return None
    try:
        fast = fastokens.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except (ValueError, RuntimeError):  # a part of the tokenizer it does not have; `tokenizers` has them all
        return None
    fast.no_truncation()
    fast.no_padding()
    fast.enable_segment_cache(CACHE_BYTES)
    return fast, bytes_of_ids(data)


def is_byte_level(data: dict[str, Any]) -> bool:
    """Whether tokens of a tokenizer.json spell bytes of the text: byte-level, and nothing but NFC normalized."""
    byte_level = [step for step in _pre_tokenizers(data) if step.get("type") == "ByteLevel"]
    plain = (data.get("normalizer") or {"type": "NFC"})["type"] == "NFC"  # texts that NFC changes go row by row
    vocabulary = isinstance(data["model"].get("vocab"), dict)
    return bool(byte_level) and plain and vocabulary and not any(step.get("add_prefix_space") for step in byte_level)


def _pre_tokenizers(data: dict[str, Any]) -> list[dict[str, Any]]:
    steps = data.get("pre_tokenizer") or {}
    found: list[dict[str, Any]] = steps.get("pretokenizers", [steps])
    return found


def bytes_of_ids(data: dict[str, Any]) -> NDArray[numpy.int64]:
    """[v] UTF-8 bytes of text that each id of a byte-level tokenizer stands for.

    Args:
        data: the tokenizer.json.
    """
    vocabulary, added = data["model"]["vocab"], data.get("added_tokens", [])
    numbers = numpy.fromiter(vocabulary.values(), numpy.int64, len(vocabulary))
    highest = max([int(numbers.max(initial=0)), *(token["id"] for token in added)])
    sizes = numpy.zeros(highest + 1, numpy.int64)
    sizes[numbers] = numpy.fromiter(map(len, vocabulary), numpy.int64, len(vocabulary))  # one character per byte
    for token in added:
        sizes[token["id"]] = len(token["content"].encode())
    return sizes


def text_bytes_of_ids(folder: Path) -> NDArray[numpy.int64]:
    """[v] UTF-8 bytes of people's text that each id of a tokenizer stands for; control tokens stand for none.

    Of tokenizers that are not byte-level `▁` is a space, also the one that some put in front of a text, and `<0x0A>` is
    one byte.
    """
    data = orjson.loads((folder / "tokenizer.json").read_bytes())
    if any(step.get("type") == "ByteLevel" for step in _pre_tokenizers(data)):
        sizes = bytes_of_ids(data)
    else:
        listed = data["model"]["vocab"]  # text → id, or of a Unigram model [text, score] by id
        pairs = listed.items() if isinstance(listed, dict) else [(text, i) for i, (text, _) in enumerate(listed)]
        added = [(token["content"], token["id"]) for token in data.get("added_tokens", [])]
        vocabulary = {number: text for text, number in [*pairs, *added]}
        sizes = numpy.zeros(max(vocabulary) + 1, numpy.int64)
        for number, text in vocabulary.items():
            sizes[number] = 1 if BYTE_PIECE.fullmatch(text) else len(text.replace("▁", " ").encode())
    for token in data.get("added_tokens", []):
        if token["special"]:
            sizes[token["id"]] = 0
    return sizes


def added_bos(tokenizer: Tokenizer, folder: Path) -> tuple[str, int] | None:
    """Text and id of the BOS that the tokenizer puts in front by itself; None when it puts none."""
    added = tokenizer.encode("x", add_special_tokens=True).ids
    plain = tokenizer.encode("x", add_special_tokens=False).ids
    config = read_object(folder / "tokenizer_config.json")
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    bos_id = tokenizer.token_to_id(bos) if bos else None
    if bos is None or bos_id is None or added[:1] != [bos_id] or plain[:1] == [bos_id]:
        return None
    return bos, bos_id
