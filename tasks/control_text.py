"""Control tokens that somebody typed: finding them, and keeping a template from taking them for its own.

One decision: what is typed is disguised before it is rendered. Two private-use characters go inside every typed control
token, so no template and no search can mistake it; after rendering they come out again and say where it stands. A row
that reads differently without the disguise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

ControlTokens = Literal["plain", "keep", "refuse"]
"""What typed control tokens become: text like any other, the real tokens (as publishers do), or a refusal."""

REASONING_TAGS = frozenset({"<think>", "</think>"})  # an answer's own: control tokens in some vocabularies
PRIVATE_USE = range(0xE100, 0xF8FF)


class Scanner:
    """Finds control tokens in text; fast also for the thousands of them that some vocabularies have."""

    def __init__(self, tokens: frozenset[str]) -> None:
        self.tokens = tokens
        self.lengths = sorted({len(token) for token in tokens}, reverse=True)
        beginnings = sorted({token[:2] for token in tokens})
        self.beginning = re.compile("|".join(map(re.escape, beginnings)) or "(?!)")  # (?!) never matches

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """[start, end) of every control token, leftmost and longest first.

        >>> list(Scanner(frozenset({"<s>", "</s>"})).find("a</s><s>"))
        [(1, 5), (5, 8)]
        """
        position = 0
        while hit := self.beginning.search(text, position):
            start = hit.start()
            token = next((text[start : start + n] for n in self.lengths if text[start : start + n] in self.tokens), "")
            if token:
                yield start, start + len(token)
            position = start + (len(token) or 1)

    def across(self, text: str, border: int) -> str | None:
        """The control token that stands on both sides of a border, if there is one."""
        reach = self.lengths[0] - 1 if self.lengths else 0
        begin = max(0, border - reach)
        window = text[begin : border + reach]
        found = (window[start:end] for start, end in self.find(window) if start < border - begin < end)
        return next(found, None)

    def common_prefix(self, one: str, two: str) -> str:
        """The longest common prefix that cuts no control token of either text.

        >>> Scanner(frozenset({"<|end|>", "<|eos|>"})).common_prefix("<|end|>\\n<|eos|>", "<|end|>\\n<|user|>")
        '<|end|>\\n'
        """
        length = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        for start, end in (*self.find(one), *self.find(two)):
            if start < length < end:
                length = start
        return one[:length]


@dataclass(frozen=True)
class Typed:
    """One control token found in a row's own text."""

    place: str
    """`message 2` or `tools`."""
    token: str
    can_be_hidden: bool
    """Whether a disguise can hide it: not one of a single character, nor one cut in two by content parts."""


def find_typed(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, scanner: Scanner, first: int = 1
) -> Iterator[Typed]:
    """Every control token in the strings of a row, keys too.

    The reasoning tags of an answer are not typed control tokens, whatever the vocabulary says of them.

    Args:
        messages, tools: the row.
        scanner: of the control tokens.
        first: number of the first message.
    """
    for number, message in enumerate(messages, first):
        for string in strings(message):
            for start, end in scanner.find(string):
                if not _belongs(string[start:end], message):
                    yield Typed(f"message {number}", string[start:end], end - start > 1)
        for token in _across_parts(message.get("content"), scanner):
            yield Typed(f"message {number}", token, False)
    for string in strings(tools):
        yield from (Typed("tools", string[start:end], end - start > 1) for start, end in scanner.find(string))


def _belongs(token: str, message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant" and token in REASONING_TAGS


def _across_parts(content: Any, scanner: Scanner) -> Iterator[str]:
    """Control tokens that only stand there once the text parts of a content are put together."""
    if not isinstance(content, list | tuple):
        return
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    whole, borders, length = "".join(texts), set(), 0
    for text in texts[:-1]:
        length += len(text)
        borders.add(length)
    for start, end in scanner.find(whole):
        if any(start < border < end for border in borders):
            yield whole[start:end]


def strings(value: Any) -> Iterator[str]:
    """Every string inside JSON data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from strings(name)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """JSON data with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(name, change): _changed(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(item, change) for item in value]
    return value


@dataclass(frozen=True)
class Revealed:
    """A rendering without its disguise."""

    text: str
    typed: tuple[tuple[int, int], ...]
    """Character ranges of the typed control tokens in `text`."""
    positions: tuple[int, ...]
    """Where each disguise character stood in the disguised text, in order."""

    def shifted(self, position: int) -> int:
        """A position of the disguised text in `text`."""
        return position - sum(1 for place in self.positions if place < position)


@dataclass(frozen=True)
class Disguise:
    """Two characters that a row does not have, put inside the control tokens that were typed.

    >>> disguise = Disguise(Scanner(frozenset({"<s>"})), "{", "}")
    >>> disguise.hide("a <s>")
    'a <{s}>'
    >>> disguise.reveal("x a <{s}>")
    Revealed(text='x a <s>', typed=((4, 7),), positions=(5, 7))
    """

    scanner: Scanner
    opening: str
    closing: str

    @classmethod
    def of_row(cls, scanner: Scanner, *parts: Any) -> Disguise:
        """The first two private-use characters that the parts (messages, tools, the template) do not have."""
        used = set().union(*(string for part in parts for string in strings(part)))
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        return cls(scanner, next(free), next(free))

    def hide(self, text: str, keep: frozenset[str] = frozenset()) -> str:
        """Text with its control tokens disguised, but those to keep."""
        pieces, position = [], 0
        for start, end in self.scanner.find(text):
            if text[start:end] not in keep:
                pieces += [text[position : start + 1], self.opening, text[start + 1 : end - 1], self.closing]
                position = end - 1
        return "".join([*pieces, text[position:]])

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with what was typed disguised; the names of their fields stay."""
        found = []
        for message in messages:
            keep = REASONING_TAGS if message.get("role") == "assistant" else frozenset()

            def hide(text: str, keep: frozenset[str] = keep) -> str:
                return self.hide(text, keep)

            found.append({name: _changed(value, hide) for name, value in message.items()})
        return found

    def tools(self, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Tools with what was typed disguised."""
        return cast("list[dict[str, Any]] | None", _changed(tools, self.hide))

    def reveal(self, text: str) -> Revealed | None:
        """Text without the disguise; None when a disguised token did not come through whole."""
        pieces, typed, positions = [], [], []
        length, place, start = 0, 0, None
        for piece in re.split(f"([{self.opening}{self.closing}])", text):
            place += len(piece)
            if piece not in (self.opening, self.closing):
                pieces.append(piece)
                length += len(piece)
                continue
            positions.append(place - 1)
            if (piece == self.opening) != (start is None):
                return None
            if start is None:
                start = length - 1
            else:
                typed.append((start, length + 1))
                start = None
        clean = "".join(pieces)
        whole = start is None and all(clean[begin:end] in self.scanner.tokens for begin, end in typed)
        return Revealed(clean, tuple(typed), tuple(positions)) if whole else None

    def plain(self, text: str) -> str:
        """Text without the characters of the disguise, wherever they stand."""
        return text.replace(self.opening, "").replace(self.closing, "")
