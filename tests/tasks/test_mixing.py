"""Mixtures: each row as often as asked for, shares as asked for, and the same order every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from registry.errors import InputError
from registry.loading import load_recipe
from tasks.mixing import mixed

SETS = [numpy.arange(0, 300), numpy.arange(300, 400), numpy.arange(400, 450)]


def drawn(strategy: str, probabilities: list[float], seed: int = 0, repeats: tuple[int, ...] = (1, 1, 1)) -> list[int]:
    mixture = {"strategy": strategy, "repeats": list(repeats), "probabilities": probabilities, "seed": seed}
    return [int(row) for row in mixed(SETS, mixture)]


def test_data_sets_behind_each_other_are_seen_as_often_as_they_repeat() -> None:
    found = mixed([numpy.array([5, 6]), numpy.array([7])], {"strategy": "concat", "repeats": [1, 3]})
    assert found.tolist() == [5, 6, 7, 7, 7]


def test_under_stops_with_the_last_row_of_the_first_that_has_no_more_and_repeats_nobody() -> None:
    found = drawn("interleave_under", [1, 1, 1])
    assert len(found) == len(set(found))
    assert found[-1] == 449
    assert [row for row in found if row >= 400] == list(range(400, 450))
    assert [row for row in found if row < 300] == list(range(len([row for row in found if row < 300])))


def test_over_stops_when_all_have_been_seen_whole_and_begins_the_others_again() -> None:
    found = drawn("interleave_over", [1, 1, 1])
    assert set(found) == set(range(450))
    assert found[-1] == 299
    assert [row for row in found if row >= 400][:51] == [*range(400, 450), 400]


def test_shares_are_those_asked_for() -> None:
    found = drawn("interleave_over", [8.0, 1.0, 1.0])
    share = sum(row < 300 for row in found) / len(found)
    assert share == pytest.approx(0.8, abs=0.05)


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    assert drawn("interleave_under", [1, 1, 1]) == drawn("interleave_under", [2, 2, 2])
    assert drawn("interleave_under", [1, 1, 1]) != drawn("interleave_under", [1, 1, 1], seed=1)


def test_a_data_set_of_which_no_row_is_left_is_drawn_no_more() -> None:
    mixture = {"strategy": "interleave_under", "repeats": [1, 1], "probabilities": [1, 1], "seed": 0}
    assert mixed([numpy.arange(3), numpy.arange(0)], mixture).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interleave_probs": "0.5,0.5"}, "interleave_probs has no effect with mix_strategy concat"),
        ({"interleave_probs": [1.0], "mix_strategy": "interleave_under"}, "1 shares for 2 data sets"),
        ({"overlong": "split"}, "conversations cannot be split"),
        ({"train_on_prompt": True, "mask_history": True}, "mask_history the last answer only"),
        ({"interleave_probs": [1.0, -1.0]}, "interleave_probs"),
    ],
)
def test_choices_without_effect_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": "q", "output": name}) + "\n")
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    raw = {"model_name_or_path": "x/y", "stages": {"sft": {"stage": "sft", "dataset": files} | settings}}
    with pytest.raises(InputError, match=message):
        load_recipe(raw)
