"""Conditions that a model has to meet, as data.

`METRIC [- base | - champion] OPERATOR NUMBER [at 95%]`, e.g.::

    perplexity.held_out < 6.5                     the number itself
    perplexity.held_out - base < 0                its difference to that of the model the stage started from
    perplexity.held_out - champion <= 0.05        to that of the model that is the champion now
    reward_accuracy.pairs - champion >= 0 at 95%  the whole interval of the difference, not just the difference
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from registry.errors import InputError, Problem

FORM = re.compile(
    r"(?P<metric>[^\s<>=]+)(?:\s+-\s+(?P<other>\w+))?\s*(?P<sign><=|>=|<|>)\s*"
    r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<sure>at\s+95\s*%)?"
)
BASE, CHAMPION = OTHERS = ("base", "champion")
SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
CURE = 'E.g. "perplexity.held_out - base < 0" or "perplexity.held_out - champion <= 0 at 95%".'


@dataclass(frozen=True)
class Condition:
    """One condition of a gate."""

    text: str
    """As it was written."""
    metric: str
    other: str | None
    """`base` or `champion`, whose number is taken off."""
    sign: str
    number: float
    sure: bool
    """It has to hold for the whole 95 % interval."""

    def holds(self, value: float, low: float, high: float) -> bool:
        """Whether it does.

        >>> condition("m - champion >= 0 at 95%").holds(0.1, -0.05, 0.25)
        False
        """
        end = (high if self.sign in ("<", "<=") else low) if self.sure else value
        return SIGNS[self.sign](end, self.number)


def condition(text: str, where: str = "gate") -> Condition:
    """Read a condition.

    Raises:
        InputError: it has another form.
    """
    found = FORM.fullmatch(text.strip())
    if found is None:
        raise InputError(Problem(where, f"{text!r} is no condition", CURE))
    other = found["other"]
    if other is not None and other not in OTHERS:
        raise InputError(Problem(where, f"{text!r}: {other!r} is neither base nor champion", CURE))
    return Condition(text.strip(), found["metric"], other, found["sign"], float(found["number"]), bool(found["sure"]))
