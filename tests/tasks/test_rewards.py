"""How a reward model is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.program import ProgramError
from tasks.rewards import reward_results, score_pairs
from tasks.scoring import Shards, score_rows
from tasks.train.batches import collate
from tasks.train.model import load_base
from tasks.train.reward import answer_scores
from tests.tiny import random_pairs, random_rows, tiny_model, write_shards

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(str(tiny_model(tmp_path_factory.mktemp("scoring") / "model")), torch.float32, score=True).eval()


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


def alone(model: Any, row: dict[str, list[int]]) -> float:
    """The score of one text, from the head's own output at its last trained token, without our reading of it."""
    last = max(place for place, label in enumerate(row["labels"]) if label != -100)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state
        return float(model.score(hidden.float())[0, last, 0])


@pytest.mark.parametrize("pad", [0, 256, 260], ids=["any", "pad", "the end of an answer"])
@pytest.mark.parametrize("mates", [1, 2, 7])
def test_the_score_of_a_text_is_that_of_the_text_alone(scoring: Any, pad: int, mates: int) -> None:
    rows = random_rows(8, seed=3, shortest=4, longest=40)
    for row in rows:  # the first ones end with the token that ends answers, and go on behind the answer
        row["input_ids"] += [260, 10]
        row["labels"] += [260, -100]
    wanted = [alone(scoring, row) for row in rows]
    for first in range(8 - mates):
        chosen = [0, *range(first + 1, first + 1 + mates)]
        batch = collate([rows[n] | {"seq_lengths": [len(rows[n]["input_ids"])]} for n in chosen], packing=False).inputs
        batch["input_ids"][batch["attention_mask"] == 0] = pad
        for name, filler in (("input_ids", pad), ("labels", -100), ("attention_mask", 0)):  # longer than any row
            batch[name] = torch.nn.functional.pad(batch[name], (0, 9), value=filler)
        with torch.no_grad():
            found = answer_scores(scoring, batch).tolist()
        assert found == pytest.approx([wanted[n] for n in chosen], abs=1e-5)


def test_of_pairs_and_marked_answers_the_good_ones_are_scored(tmp_path: Path) -> None:
    model = load_base(str(tiny_model(tmp_path / "model")), torch.float32).eval()
    pairs = Shards(write_shards(tmp_path / "pairs", random_pairs(3), "preference"), "preference")
    assert list(score_rows(model, pairs, 2)) == [0, 2, 4]
    marks = [True, False, True, False]
    marked = Shards(write_shards(tmp_path / "marked", random_rows(4), "labelled", marks), "labelled")
    assert list(score_rows(model, marked, 2)) == [0, 2]
