"""Rules that score an answer without a model, by name; and how a function of the user's is named.

One decision: the names are those of `reward_funcs`; what has a colon is code, `FILE.py:function` or `module:function`,
and the content of its file enters the key of the training.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from registry.core import Registry
from registry.errors import InputError, Problem
from registry.online_records import RewardSettings

Score = Callable[[str, int, bool, str | None, int], float]
"""Text, tokens, whether it has its terminator, the data set's answer, most tokens → score."""


@dataclass(frozen=True)
class Rule:
    """A reward without a model."""

    score: Score
    description: str


def _length(text: str, tokens: int, stopped: bool, reference: str | None, most: int) -> float:
    return tokens / most


def _stopped(text: str, tokens: int, stopped: bool, reference: str | None, most: int) -> float:
    return float(stopped)


def _matches(text: str, tokens: int, stopped: bool, reference: str | None, most: int) -> float:
    return float(reference is not None and text.strip() == reference.strip())


RULES: Registry[Rule] = Registry(
    "reward function",
    lambda: [
        ("length", Rule(_length, "Tokens of the answer as a share of max_new_tokens; a negative weight shortens.")),
        ("stopped", Rule(_stopped, "1 for an answer that ends by itself, 0 for one that is cut.")),
        ("exact_match", Rule(_matches, "1 for an answer equal to the data set's, 0 for another.")),
    ],
)


def is_code(name: str) -> bool:
    """Whether a reward function is the user's own code.

    >>> is_code("my_rewards.py:polite"), is_code("length")
    (True, False)
    """
    return ":" in name


def short_name(name: str) -> str:
    """A reward function without the folder its file is in: what is logged, and counts.

    >>> short_name("/somewhere/my_rewards.py:polite")
    'my_rewards.py:polite'
    """
    return Path(name).name if is_code(name) else name


def code_file(name: str, where: str) -> Path:
    """The file of a reward function that is the user's code.

    Raises:
        InputError: there is none.
    """
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        path = Path(place)
    else:
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            found = None
        path = Path(found.origin) if found and found.origin else Path(place)
    if not path.is_file():
        rule = f"{name}: {'no such file' if place.endswith('.py') else f'there is no module {place}'}"
        raise InputError(Problem(where, rule, "Write FILE.py:function, relative to the recipe, or module:function."))
    return path


def reward_problems(settings: RewardSettings, where: Callable[[str], str]) -> Iterator[Problem]:
    """What is wrong with the rewards of a stage."""
    for name in settings.reward_funcs:
        try:
            if is_code(name):
                code_file(name, where("reward_funcs"))
            else:
                RULES.lookup(name, where("reward_funcs"))
        except InputError as error:
            yield from error.problems
    given, wanted = len(settings.reward_weights), len(settings.reward_funcs) + (settings.reward_model is not None)
    if given and given != wanted:
        rule = f"{given} weights for {wanted} rewards"
        yield Problem(where("reward_weights"), rule, "One for each: the reward model's first, then reward_funcs.")
    names = [short_name(name) for name in settings.reward_funcs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        yield Problem(where("reward_funcs"), f"{twice[0]} is named twice", "Add up its weights.")
