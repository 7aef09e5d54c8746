"""A sweep file: the settings of a recipe that are varied, and over what.

One decision: what is written decides between the two forms, a list of values or a range; whether a range is of whole
numbers is the recipe's business, so `{low: 0, high: 1}` of a setting that takes fractions has fractions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from registry.core import read_text, read_yaml, user_path
from registry.errors import InputError, Problem, shown
from registry.evaluation_records import EvaluationSettings
from registry.record import Record
from registry.stage_settings import ALIASES, FIELDS, read_record
from registry.sweep_records import RangeSettings, SweepSettings

EXAMPLE = "E.g. [1.0e-4, 3.0e-4] or {low: 1.0e-5, high: 1.0e-3, log: true}."
GRID = "grid"
NAMED = {
    "name": "is what the recipe is called, which changes nothing",
    "evaluation.gate": "decides on the best trial, when all are done",
}
"""What is no parameter."""


@dataclass(frozen=True)
class Choices:
    """A list of values."""

    values: tuple[Any, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Each value as one text; none is there twice."""
        return tuple(value_text(value) for value in self.values)

    def corners(self) -> tuple[Any, ...]:
        """The values that have to be good for all to be."""
        return self.values

    def grid(self) -> tuple[Any, ...]:
        """All values."""
        return self.values


@dataclass(frozen=True)
class Range:
    """Numbers between two, both included."""

    low: float
    high: float
    log: bool
    step: float | None
    whole: bool
    """Whole numbers only."""

    def corners(self) -> tuple[Any, ...]:
        """The values that have to be good for all to be."""
        return self._value(self.low), self._value(self.high)

    def grid(self) -> tuple[Any, ...] | None:
        """All values; None where there are as many as one likes.

        >>> Range(0.1, 0.3, False, 0.1, False).grid()
        (0.1, 0.2, 0.3)
        """
        if self.step is None:
            return None
        low, step = Decimal(repr(self.low)), Decimal(repr(self.step))  # in floats 0.1 + 2 * 0.1 is not 0.3
        return tuple(self._value(float(low + number * step)) for number in range(self._steps() + 1))

    def _steps(self) -> int:
        assert self.step is not None
        return int((Decimal(repr(self.high)) - Decimal(repr(self.low))) / Decimal(repr(self.step)))

    def reaches(self) -> float:
        """The last value, counted in steps from the first."""
        assert self.step is not None
        return float(Decimal(repr(self.low)) + self._steps() * Decimal(repr(self.step)))

    def _value(self, number: float) -> Any:
        return int(number) if self.whole else number


@dataclass(frozen=True)
class Sweep:
    """A validated sweep file; whether it fits a recipe is not known yet."""

    settings: SweepSettings
    space: Mapping[str, Choices | Range]
    """Setting → its values."""


def value_text(value: Any) -> str:
    """A value as people read it, different for different values: JSON, and of a plain text the text itself.

    >>> value_text("linear"), value_text("1"), value_text(1), value_text([1, "a"])
    ('linear', '"1"', '1', '[1, "a"]')
    """
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return text
    try:
        json.loads(value)
    except ValueError:
        return value
    return text


def read_sweep(name: str) -> Sweep:
    """Read and validate a sweep file.

    Raises:
        InputError: everything that is wrong, at once.
    """
    path = user_path(name, "sweep file").absolute()
    if not path.is_file():
        raise InputError(Problem(str(path), "the sweep file does not exist", "Check the path."))
    raw = read_yaml(read_text(path), str(path))
    if not isinstance(raw, dict) or not raw:
        cure = "See docs/sweeps.md."
        raise InputError(Problem("", "a sweep is a mapping of metric, method and parameters", cure), path.name)
    problems: list[Problem] = []
    settings: SweepSettings | None = read_record(SweepSettings, raw, lambda key: key, problems)
    space: dict[str, Choices | Range] = {}
    parameters, grid = raw.get("parameters"), raw.get("method") == GRID
    written: dict[str, Any] = parameters if isinstance(parameters, dict) else {}
    for key, value in written.items():
        found = _values(key, value, grid, problems)
        space |= {key: found} if found is not None else {}
        if key in NAMED:
            problems.append(Problem(f"parameters.{key}", NAMED[key], "Remove it."))
        if any(other.startswith(f"{key}.") for other in written):
            problems.append(Problem(f"parameters.{key}", "another parameter is inside it", "Name settings one by one."))
    if settings is not None and settings.method == GRID and settings.trials is not None:
        rule = f"{settings.trials} has no effect with method grid, which tries every combination"
        problems.append(Problem("trials", rule, "Remove it, or use method random or tpe."))
    if settings is not None and settings.method != GRID and settings.trials is None:
        problems.append(Problem("trials", f"missing, and method {settings.method} has no end of its own", "E.g. 20."))
    if problems:
        raise InputError(list(dict.fromkeys(problems)), f"sweep {path.name}")
    assert settings is not None
    return Sweep(settings, space)


def _values(key: str, value: Any, grid: bool, problems: list[Problem]) -> Choices | Range | None:
    where = f"parameters.{key}"
    if isinstance(value, list):
        return _choices(where, value, problems)
    if isinstance(value, dict):
        return _range(key, value, grid, problems)
    problems.append(Problem(where, f"{shown(value)} is neither a list of values nor a range", EXAMPLE))
    return None


def _choices(where: str, values: list[Any], problems: list[Problem]) -> Choices | None:
    if not values:
        problems.append(Problem(where, "the list is empty", EXAMPLE))
        return None
    try:
        found = Choices(tuple(values))
        texts = found.texts
    except (TypeError, ValueError):  # a date, a set
        rule = f"{shown(values)}: only text, numbers, true/false, null, lists and mappings can be used"
        problems.append(Problem(where, rule, "Quote it."))
        return None
    twice = [text for number, text in enumerate(texts) if text in texts[:number]]
    if twice:
        problems.append(Problem(where, f"{twice[0]} is there twice", "Remove one of them."))
        return None
    return found


def _range(key: str, value: Mapping[str, Any], grid: bool, problems: list[Problem]) -> Range | None:
    where, known = f"parameters.{key}", len(problems)
    found: RangeSettings | None = read_record(RangeSettings, value, lambda name: f"{where}.{name}", problems)
    if found is None:
        return None
    whole = not takes_fractions(key)
    problems += _range_problems(where, found, whole)
    if len(problems) > known:
        return None
    step = 1.0 if whole and found.step is None and not found.log else found.step
    made = Range(found.low, found.high, found.log, step, whole)
    if step is not None and not math.isclose(made.reaches(), made.high, rel_tol=1e-12):
        rule = f"steps of {step:g} from {made.low:g} do not reach {made.high:g}"
        problems.append(Problem(f"{where}.high", rule, f"E.g. {made.reaches():g}."))
    if grid and step is None:
        problems.append(Problem(where, "a grid needs single values", "Give a list, or set step."))
    return made if len(problems) == known else None


def _range_problems(where: str, found: RangeSettings, whole: bool) -> list[Problem]:
    problems = []
    if found.low >= found.high:
        problems.append(Problem(f"{where}.high", f"{found.high:g} is not above low {found.low:g}", EXAMPLE))
    if found.log and found.low <= 0:
        problems.append(Problem(f"{where}.low", f"{found.low:g} has no logarithm", "Set it above 0, or remove log."))
    if found.log and found.step is not None:
        rule = "steps are even, and log draws evenly by the logarithm"
        problems.append(Problem(f"{where}.step", rule, "Remove one of them."))
    for name, number in (("low", found.low), ("high", found.high), ("step", found.step)):
        if whole and number is not None and not number.is_integer():
            problems.append(Problem(f"{where}.{name}", f"{number} is no whole number, which the setting takes"))
    return problems


def takes_fractions(key: str) -> bool:
    """Whether a setting of a recipe, by its dotted path, takes numbers that are not whole; unknown ones do.

    >>> takes_fractions("stages.sft.learning_rate"), takes_fractions("stages.sft.lora_rank")
    (True, False)
    """
    *above, name = key.split(".")
    record: type[Record] | None = EvaluationSettings if above[:1] == ["evaluation"] else None
    name = name if record is not None else ALIASES.get(name, name)
    record = record or FIELDS.get(name)
    if record is None or name not in record.model_fields:
        return True
    form = record.model_json_schema()["properties"][name]
    kinds = {each.get("type") for each in form.get("anyOf", [form])}
    return "number" in kinds or "integer" not in kinds
