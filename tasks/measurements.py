"""What every measurement of a model leaves: numbers with intervals, and the values they were drawn from.

One decision: the drawn values of a number are kept with it. Two models were measured on the same rows when the digests
of the rows agree; their drawn values then belong together one by one, and the interval of any difference is a
subtraction, whatever the metric is. So who compares needs to know no metric.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from registry.errors import InputError, Problem
from tasks.artifacts import Artifact
from tasks.intervals import LEAST_ROWS, Array, drawn_ratios, limits

KINDS = ("evaluate", "implicit_reward", "benchmark", "generate", "win_rate")
"""Kinds of the steps that measure a model."""
RESULTS, DRAWN = "results.json", "drawn.npz"
DOCUMENTS = "documents"
"""Of a result whose rows are no input of the step: their digest."""

MINIMIZE, MAXIMIZE = "minimize", "maximize"
DIRECTIONS = {
    **dict.fromkeys(("perplexity", "bits_per_byte", "reward_calibration_error"), MINIMIZE),
    **dict.fromkeys(("word_perplexity", "byte_perplexity", "ter", "brier_score"), MINIMIZE),  # lm-eval's
    **dict.fromkeys(("bleu", "chrf", "rouge1", "rouge2", "rougeL", "token_f1", "exact_match", "f1"), MAXIMIZE),
    **dict.fromkeys(("accuracy", "accuracy_norm", "mc1", "mc2"), MAXIMIZE),
    **dict.fromkeys(("reward_accuracy", "reward_margin", "win_rate_base", "win_rate_reference"), MAXIMIZE),
    **dict.fromkeys(("preference_accuracy", "preference_accuracy_norm", "implicit_reward_accuracy"), MAXIMIZE),
}
"""Which way a metric is better. Not there: what says nothing by itself, as the mean length of answers or the mean score
that a reward model gives."""


def direction(metric: str) -> str | None:
    """Which way a metric is better; None where that is not known.

    >>> direction("perplexity"), direction("reward_accuracy_chosen_shorter"), direction("exact_match_strict")
    ('minimize', 'maximize', 'maximize')

    Args:
        metric: without its data set; a kind of rows, or a filter of lm-eval, may be behind its name.
    """
    names = [name for name in DIRECTIONS if metric == name or metric.startswith(f"{name}_")]
    return DIRECTIONS[max(names, key=len)] if names else None


class Measure(NamedTuple):
    """A number that was measured."""

    result: dict[str, Any]
    """`value`, `low`, `high` (95 %, see `tasks.intervals`), `rows`, and what else there is to say; plain JSON."""
    drawn: Array
    """[n] its values for drawn rows."""


def measure(value: float, drawn: Array, rows: int, **more: Any) -> Measure:
    """A number, and its interval from drawn values, [n]."""
    return Measure({"value": value, **limits(drawn), **more, "rows": rows}, drawn)


def mean(values: Array, **more: Any) -> Measure:
    """The mean over rows.

    >>> mean(numpy.array([1.0, 0.0, 1.0, 1.0])).result
    {'value': 0.75, 'low': 0.25, 'high': 1.0, 'rows': 4}

    Args:
        values: [r] one for each row; at least one.
        more: to keep in the result.
    """
    values = numpy.asarray(values, numpy.float64)
    return measure(float(values.mean()), drawn_ratios(values, numpy.ones(len(values))), len(values), **more)


def write_results(output: Path, measures: Mapping[str, Measure]) -> None:
    """Write `results.json` and `drawn.npz`.

    Args:
        output: the artifact's folder.
        measures: `<metric>.<position of the data set>` → number.
    """
    results = {name: found.result for name, found in measures.items()}
    (output / RESULTS).write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    drawn: dict[str, Any] = {name: found.drawn for name, found in measures.items()}
    numpy.savez(output / DRAWN, **drawn)


class Number(NamedTuple):
    """A metric on one data set."""

    metric: str
    set_name: str
    rows: str
    """Digest of the rows."""
    result: dict[str, Any]
    drawn: Array
    """[n] values for drawn rows."""


def numbers(artifact: Artifact, set_names: Sequence[str] = ()) -> Iterator[Number]:
    """Everything in a measurement.

    Args:
        artifact: made by a step of one of `KINDS`.
        set_names: present names of its data sets, in their order; none: their positions.

    Raises:
        InputError: an artifact of an earlier version.
    """
    if not (artifact.path / DRAWN).is_file():
        rule = "was measured by an earlier version, which kept less"
        raise InputError(Problem(f"{artifact.step}/{artifact.path.name}", rule, "Run its recipe again."))
    with numpy.load(artifact.path / DRAWN, allow_pickle=False) as drawn:
        for name, result in stored_results(artifact.path).items():
            metric, _, position = name.rpartition(".")
            rows = result.get(DOCUMENTS) or artifact.manifest["inputs"][f"set.{position}"]["digest"]
            yield Number(metric, set_names[int(position)] if set_names else position, rows, result, drawn[name])


def read_results(artifact: Path, set_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`<metric>.<set>` → value, rows and what they were made of; sets by their present names."""
    found = by_set(artifact, set_names)
    return {f"{metric}.{name}": result for name, results in found.items() for metric, result in results.items()}


def by_set(artifact: Path, set_names: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Data set by its present name → metric → the same."""
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in set_names}
    for key, result in stored_results(artifact).items():
        metric, _, position = key.rpartition(".")
        results[set_names[int(position)]][metric] = result
    return results


def stored_results(artifact: Path) -> dict[str, dict[str, Any]]:
    """`<metric>.<position of the data set>` → what was written, without intervals of too few rows."""
    stored: dict[str, dict[str, Any]] = json.loads((artifact / RESULTS).read_text(encoding="utf-8"))
    for result in stored.values():
        if result["rows"] < LEAST_ROWS:
            result.pop("low", None)
            result.pop("high", None)
    return stored
