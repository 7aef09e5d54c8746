"""What a chat template writes around the texts of a conversation, learned once for each form of conversation.

One decision: the fast way is proved to give what the slow way gives. A template that gets through on opaque texts (see
`tasks.opaque`) writes the same around every text that its guards hold for; the spans come from the engine itself, from
one conversation of stand-in words of the same form. Every row that is not covered goes the slow way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from tasks.control_text import ControlTokens
from tasks.opaque import CLOSE, OPEN, TOKEN, Guard, Opaque, OpaqueEnvironment, Recorder, changed
from tasks.spans import Rendered
from tasks.template import ChatTemplate
from tasks.template_language import make_environment

MOST_TURNS = 64  # longer conversations are rare, and learning a form takes time by the square of its turns
STAND_IN = "Vorlun{}q"  # a word that no template looks for
Spans = Callable[[Rendered], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Skeleton:
    """The fixed parts of one form of conversation."""

    literals: tuple[str, ...]
    """What stands before, between and behind the texts; one more than `slots`."""
    slots: tuple[tuple[int, tuple[tuple[str, str | None], ...]], ...]
    """(number of the message, what is stripped from its text), in the order of the output."""
    guards: tuple[Guard, ...]
    """Questions about texts that must be answered no."""
    borders: tuple[tuple[int, int], ...]
    """Starts and ends of the spans in turn: (literal, bytes into it)."""
    lost: tuple[str, ...]
    """As `Rendered.lost`."""

    def fill(self, contents: Sequence[str]) -> tuple[str, list[int]] | None:
        """Text and flat byte spans for the texts of a row; None when a guard does not hold."""
        for guard in self.guards:
            if not guard.holds(contents[guard.text]):
                return None
        parts = [""] * (2 * len(self.slots) + 1)
        parts[::2] = self.literals
        parts[1::2] = [changed(contents[n], changes) if changes else contents[n] for n, changes in self.slots]
        text = "".join(parts)
        sizes = map(len, parts) if text.isascii() else (len(part.encode()) for part in parts)
        ends = [0, *accumulate(sizes)]
        return text, [ends[2 * literal] + offset for literal, offset in self.borders]


class Skeletons:
    """The skeletons of one template, by the roles of a conversation.

    Args:
        template: the template.
        spans: which part of a rendered row is trained, as character ranges.
        control_tokens: as `ChatTemplate.render_training`.
    """

    def __init__(self, template: ChatTemplate, spans: Spans, control_tokens: ControlTokens) -> None:
        self.template, self.spans, self.control_tokens = template, spans, control_tokens
        self.known: dict[tuple[str, ...], Skeleton | None] = {}
        self.compiled: Callable[[dict[str, Any]], str] | None = None
        if OPEN not in template.text and CLOSE not in template.text:
            environment = make_environment(template.day, OpaqueEnvironment)
            environment.guard_functions()
            self.compiled = environment.from_string(template.text).render

    def of(self, roles: tuple[str, ...]) -> Skeleton | None:
        """The skeleton of conversations with these roles; None where rows have to go the slow way."""
        if roles not in self.known:
            self.known[roles] = self._learn(roles)
        return self.known[roles]

    def _learn(self, roles: tuple[str, ...]) -> Skeleton | None:
        if self.compiled is None or len(roles) > MOST_TURNS or "assistant" not in roles:
            return None
        words = [STAND_IN.format(number) for number in range(len(roles))]
        standing = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        rendered = self.template.render_training(standing, None, self.control_tokens)
        recorder = Recorder()
        opaque = [{"role": role, "content": recorder.text(number)} for number, role in enumerate(roles)]
        try:
            written = self._draw(opaque, False)
            for number, role in enumerate(roles):  # where an answer begins is read off the prompt before it
                if role == "assistant" and number:
                    self._draw(opaque[:number], True)
        except Exception:  # noqa: BLE001 - the template is a stranger's program; the slow way says what is wrong
            return None
        if not isinstance(rendered, Rendered) or not isinstance(written, Opaque):
            return None
        if rendered.typed:  # the default system message has the text of a control token: places move with each row
            return None
        pieces = TOKEN.split(str.__str__(written))
        if _can_join(pieces[::2], self.template.control_tokens):
            return None
        slots = tuple(recorder.forms[int(number)] for number in pieces[1::2])
        guards = tuple(recorder.guards)
        if not all(guard.holds(words[guard.text]) for guard in guards):
            return None
        spans = self.spans(rendered)
        borders = _borders(spans, pieces[::2], [words[number] for number, _ in slots])
        if borders is None:
            return None
        skeleton = Skeleton(tuple(pieces[::2]), slots, guards, borders, rendered.lost)
        return skeleton if skeleton.fill(words) == (rendered.text, flat_bytes(rendered.text, spans)) else None

    def _draw(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        assert self.compiled is not None
        return self.compiled(self.template.variables_of(self.template.with_system(messages), None, prompt))


def _can_join(literals: list[str], tokens: frozenset[str]) -> bool:
    """Whether a text and what stands beside it can make a control token together: `<` and `|im_end|>`."""
    if not all(literals[1:-1]):
        return True  # two texts beside each other
    before, behind = literals[:-1], literals[1:]
    starts, ends = _parts(tokens)
    return any(text.endswith(starts) for text in before) or any(text.startswith(ends) for text in behind)


@lru_cache(maxsize=8)
def _parts(tokens: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """With what any token can begin and end; some tokenizers have a thousand, and each form of conversation asks."""
    parts = [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))]
    return tuple({start for start, _ in parts}), tuple({end for _, end in parts})


def _borders(
    spans: Sequence[tuple[int, int]], literals: list[str], words: list[str]
) -> tuple[tuple[int, int], ...] | None:
    """Each border of the spans as (literal, bytes into it); None when one is inside a text."""
    found = []
    for border in _flat(spans):
        position = 0
        for number, literal in enumerate(literals):
            if position <= border <= position + len(literal):
                found.append((number, len(literal[: border - position].encode())))
                break
            position += len(literal) + (len(words[number]) if number < len(words) else 0)
        else:
            return None
    return tuple(found)


def _flat(spans: Sequence[tuple[int, int]]) -> list[int]:
    return [border for span in spans for border in span]


def flat_bytes(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Character spans as a flat list of byte offsets in UTF-8.

    >>> flat_bytes("é ok", ((2, 4),))
    [3, 5]
    """
    flat = [border for span in spans for border in span]
    return flat if text.isascii() else [len(text[:border].encode("utf-8")) for border in flat]
