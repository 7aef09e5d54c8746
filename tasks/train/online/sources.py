"""Where scores come from: the reward model, rules, and functions of the user's.

One decision: a function gets what TRL gives to its reward functions, as keywords (`prompts`, `completions`,
`completion_ids`, and `reference`, the data set's own answers), so functions that people have run here. It is called
once per step, on the first process, with all of the step's answers.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.reward_rules import RULES, is_code
from tasks.program import ProgramError
from tasks.train.online.inputs import Answered

Function = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Source:
    """A reward function or rule."""

    name: str
    weight: float
    function: Function


def find_sources(settings: Mapping[str, Any], files: Mapping[str, str]) -> list[Source]:
    """The functions that a stage's `reward_funcs` name.

    Args:
        settings: `TrainSettings.identity()`.
        files: name → file, of those that are the user's code.

    Raises:
        ProgramError: `bad_setting` for code that cannot be imported or has no such function.
    """
    names, weights = settings["reward_funcs"], list(settings["reward_weights"])
    own = weights[-len(names) :] if names else []
    return [
        Source(name, weight, _import(name, files[name]) if is_code(name) else _rule(name, settings["max_new_tokens"]))
        for name, weight in zip(names, own, strict=True)
    ]


def _rule(name: str, most: int) -> Function:
    def judge(completions: list[str], completion_ids: list[list[int]], **given: Any) -> list[float]:
        return [
            RULES[name].score(text, len(ids), stopped, reference, most)
            for text, ids, stopped, reference in zip(
                completions, completion_ids, given["stopped"], given["reference"], strict=True
            )
        ]

    return judge


def _import(name: str, file: str) -> Function:
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found: Function = getattr(module, function)
    except Exception as error:
        raise ProgramError("bad_setting", f"reward_funcs: {name}: {type(error).__name__}: {error}") from error
    return found


def judge(source: Source, answers: Sequence[Answered], texts: Mapping[str, list[str]]) -> list[float]:
    """The scores a source gives, one for each answer.

    Args:
        source: to ask.
        answers: of the step.
        texts: `prompts` and `completions`.

    Raises:
        ProgramError: `bad_setting` for another number of scores than of answers, or a score that is no number.
    """
    given: dict[str, Any] = {
        **texts,
        "completion_ids": [item.answer for item in answers],
        "reference": [item.reference for item in answers],
        "stopped": [item.stopped for item in answers],
    }
    accepted = inspect.signature(source.function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        given = {name: value for name, value in given.items() if name in accepted}
    try:
        found = [float(score) for score in source.function(**given)]  # type: ignore[arg-type]
    except Exception as error:
        raise ProgramError("bad_setting", f"reward_funcs: {source.name}: {type(error).__name__}: {error}") from error
    if len(found) != len(answers) or not all(map(math.isfinite, found)):
        odd = next((score for score in found if not math.isfinite(score)), None)
        what = f"{len(found)} scores for {len(answers)} answers" if odd is None else f"the score {odd}"
        raise ProgramError(
            "bad_setting", f"reward_funcs: {source.name} gave {what}; a finite number for each is wanted"
        )
    return found
