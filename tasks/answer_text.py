"""The text of an answer while it is written.

One decision: what has been given out never changes. So an unfinished character, and the beginning of what may become a
stop word, are held back until it is known what they are; and the parts put together are the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no whole character yet


class AnswerText:
    r"""An answer, given out in parts.

    >>> text = AnswerText(lambda ids: bytes(ids).decode(errors="replace"), ["END"])
    >>> [text.grow("h\u00e9 ENTEND!".encode()[:size]) for size in (1, 2, 3, 5, 6, 7, 10)]
    ['h', '', '\u00e9', ' ', '', 'ENT', '']
    >>> text.stopped, text.told
    (True, 'h\u00e9 ENT')

    Args:
        decode: ids [n] of an answer from its beginning → its text.
        stop: texts that end an answer; none of them is part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self.told = ""
        self.stopped = False

    def grow(self, ids: Sequence[int]) -> str:
        """What can be given out now: what no further id can change.

        All ids are decoded each time: what an id means depends on those before it. At 1,000 tokens that is about a
        millisecond, beside 50 for the token itself on two cores.

        Args:
            ids: all of the answer so far.
        """
        text = self._up_to_stop(self._decode(ids).rstrip(UNFINISHED))
        return self._tell(text if self.stopped else text[: len(text) - self._beginning(text)])

    def finish(self, ids: Sequence[int]) -> str:
        """The rest of the answer."""
        return self._tell(self._up_to_stop(self._decode(ids)))

    def _up_to_stop(self, text: str) -> str:
        places = [place for word in self._stop if (place := text.find(word)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def _beginning(self, text: str) -> int:
        """Characters at the end that a stop word may begin with."""
        ends = (size for word in self._stop for size in range(1, len(word)) if text.endswith(word[:size]))
        return max(ends, default=0)

    def _tell(self, text: str) -> str:
        # Bytes written as tokens of their own are decoded as one run, which one bad byte at its end spoils as a whole.
        if not text.startswith(self.told):
            return ""
        new, self.told = text[len(self.told) :], text
        return new
