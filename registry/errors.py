"""What a person did wrong, said once and whole.

One decision: bad input is an `InputError` holding *every* problem found, never the first
one only. Each problem names the place (file, row or key), the value, the rule and the cure.
The command line turns an `InputError` into exit code 2; nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input: where it is, what rule it breaks, how to mend it."""

    where: str
    """File, `file:line` or dotted key path, e.g. `stages.sft.learning_rate`."""
    rule: str
    """The value found and the rule it breaks, as one sentence without a full stop."""
    cure: str = ""
    """What to write instead; empty when the rule already says it."""

    def __str__(self) -> str:
        text = f"{self.where}: {self.rule}" if self.where else self.rule
        return f"{text}. {self.cure}" if self.cure else text


class InputError(Exception):
    """Everything wrong with one input, at once.

    Args:
        problems: one or more `Problem`s, in reading order.
        title: what could not be used, e.g. `recipe demo.yaml`.
    """

    def __init__(self, problems: Iterable[Problem] | Problem, title: str = "") -> None:
        self.problems: list[Problem] = [problems] if isinstance(problems, Problem) else list(problems)
        self.title = title
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems]
        if self.title:
            count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
            lines = [f"{self.title}: {count}", *(f"  {line}" for line in lines)]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type[InputError], tuple[list[Problem], str]]:
        return (InputError, (self.problems, self.title))


def shown(value: object) -> str:
    """A value as an error quotes it: as it is written in YAML where Python differs, and not longer than a line.

    >>> shown(None), shown(True), shown("x")
    ('null', 'true', "'x'")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**60 else "a number of more than 60 digits"
    return text if len(text) <= 80 else f"{text[:80]}…"


def did_you_mean(value: str, known: Sequence[str]) -> str:
    """The cure for an unknown name.

    >>> did_you_mean("lerning_rate", ["learning_rate", "seed"])
    'Did you mean learning_rate?'
    >>> did_you_mean("x", ["lora", "full"])
    'Known: full, lora'
    """
    close = get_close_matches(value, known, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(sorted(known))}" if known else "None is known."
