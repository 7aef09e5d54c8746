"""Intervals of measured numbers: as wide as theory says, paired, and the same every time."""

from __future__ import annotations

import math

import numpy
import pytest

from tasks.intervals import DRAWS, MOST, drawn_ratios, drawn_sums, limits
from tasks.measurements import mean


def normal(rows: int, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).normal(3.0, 2.0, rows)


@pytest.mark.parametrize("rows", [40, 400, 3 * MOST + 7])
def test_the_interval_of_a_mean_is_that_of_theory(rows: int) -> None:
    values = normal(rows)
    found = mean(values).result
    half = 1.96 * values.std() / math.sqrt(rows)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert mean(values).result == found


def test_it_holds_the_true_mean_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(200):
        found = mean(normal(60, seed)).result
        inside += found["low"] <= 3.0 <= found["high"]
    assert 182 <= inside <= 198  # 95 % of 200 is 190, 3.1 its standard deviation


def test_two_models_on_the_same_rows_are_drawn_alike() -> None:
    one = normal(200)
    other = one + 0.1 + 0.01 * normal(200, 1)
    difference = limits(drawn_ratios(other, numpy.ones(200)) - drawn_ratios(one, numpy.ones(200)))
    assert 0.1 < difference["low"] < difference["high"] < 0.15
    apart = mean(one).result  # whose own intervals overlap by far
    assert apart["high"] - apart["low"] > 0.4


def test_every_draw_has_as_many_rows_as_there_are() -> None:
    for rows in (1, 7, MOST, 2 * MOST + 1):
        sums = drawn_sums(numpy.ones((rows, 1)))
        assert sums.shape == (DRAWS, 1)
        if rows <= MOST:
            assert set(sums[:, 0]) == {float(rows)}
        assert sums.mean() == pytest.approx(rows, rel=1e-3)


def test_a_draw_without_anything_counted_is_left_out() -> None:
    found = limits(drawn_ratios(numpy.array([3.0, 0.0]), numpy.array([2.0, 0.0])))
    assert found == {"low": 1.5, "high": 1.5}
