"""Names of metrics, and values that are drawn again."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

from tasks.benchmark_numbers import RATIOS, drawn_again, metric_name
from tasks.intervals import SEED


def test_a_metric_is_named_as_people_know_it() -> None:
    named = {
        ("acc", "none", 1): "accuracy",
        ("acc_norm", "none", 1): "accuracy_norm",
        ("exact_match", "get-answer", 1): "exact_match",
        ("exact_match", "strict-match", 2): "exact_match_strict",
        ("exact_match", "flexible-extract", 2): "exact_match_flexible_extract",
        ("chrf++", "none", 1): "chrf++",
    }
    for (metric, kind, filters), name in named.items():
        assert metric_name(metric, kind, filters) == name


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("mean", [0.0, 1.0, 1.0, 0.25, 0.0]),
        ("nanmean", [0.0, math.nan, 1.0, 0.25, 0.5]),
        ("perplexity", [-1.0, -2.5, -0.5, -3.0]),
        ("weighted_perplexity", [(-10.0, 4), (-3.0, 2), (-20.0, 9)]),
        ("bits_per_byte", [(-10.0, 4), (-3.0, 2), (-20.0, 9)]),
        ("brier_score", [(0, [0.7, 0.3]), (1, [0.6, 0.4]), (1, [0.1, 0.9])]),
        ("f1", [(1, 1), (0, 1), (1, 0), (0, 0), (1, 1), (1, 1)]),
        ("matthews_corrcoef", [(1, 1), (0, 1), (1, 0), (0, 0), (1, 1), (0, 0)]),
    ],
)
def test_values_drawn_all_at_once_are_those_of_lm_evals_function(name: str, items: list[Any]) -> None:
    import lm_eval.api.metrics  # noqa: F401 - which fills the registry
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    function = AGGREGATION_REGISTRY[name]
    drawn = RATIOS[name](items)
    assert drawn.shape == (2000,)
    chosen = numpy.random.default_rng([SEED, len(items)]).integers(0, len(items), (200, len(items)))
    for place in range(20):
        again = [items[index] for index in chosen[place]]
        if name == "f1" and not any(gold or said for gold, said in again):
            continue
        assert drawn[place] == pytest.approx(float(function(again)), nan_ok=True), place


def test_other_numbers_are_drawn_with_lm_evals_own_function() -> None:
    from lm_eval.api.metrics import median

    drawn = drawn_again([1.0, 2.0, 3.0, 4.0, 100.0], median)
    assert drawn.shape == (2000,)
    assert set(drawn) == {1.0, 2.0, 3.0, 4.0, 100.0}
    assert float(numpy.median(drawn)) == 3.0
