"""How a reward model is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tasks.program import ProgramError
from tasks.rewards import reward_results, score_pairs
from tasks.scoring import Shards, score_rows
from tasks.train.model import load_base
from tests.tiny import random_pairs, random_rows, tiny_model, write_shards


def test_a_pair_with_equal_scores_is_not_right() -> None:
    found = reward_results([(2.0, 1.0), (0.5, 0.5), (0.0, 3.0)])
    assert found["reward_accuracy"] == {"value": 1 / 3, "right": 1, "rows": 3}
    assert found["reward_margin"] == {"value": pytest.approx(-2 / 3), "rows": 3}


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ProgramError, match="not a number"):
        reward_results([(float("nan"), 1.0)])


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = load_base(str(tiny_model(tmp_path / "model")), torch.float32, score=True).eval()
    shards = Shards(write_shards(tmp_path / "pairs", random_pairs(5), "preference"), "preference")
    one, four = (score_pairs(model, shards, size) for size in (1, 4))
    assert len(one) == 5
    for pair, other in zip(one, four, strict=True):
        assert pair == pytest.approx(other, rel=1e-5)


def test_of_pairs_and_marked_answers_the_good_ones_are_scored(tmp_path: Path) -> None:
    model = load_base(str(tiny_model(tmp_path / "model")), torch.float32).eval()
    pairs = Shards(write_shards(tmp_path / "pairs", random_pairs(3), "preference"), "preference")
    assert list(score_rows(model, pairs, 2)) == [0, 2, 4]
    marks = [True, False, True, False]
    marked = Shards(write_shards(tmp_path / "marked", random_rows(4), "labelled", marks), "labelled")
    assert list(score_rows(model, marked, 2)) == [0, 2]
