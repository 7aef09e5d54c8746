"""How a reward model is measured."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from registry.errors import InputError
from tasks.evaluation import REWARD_METRICS
from tasks.program import ProgramError
from tasks.reward_picture import draw_rewards
from tasks.rewards import (
    LENGTHS,
    Pair,
    ScoredText,
    calibration,
    paired,
    require_reward_model,
    reward_results,
    score_texts,
)
from tasks.scoring import Shards, score_rows
from tasks.train.batches import collate
from tasks.train.model import load_base
from tasks.train.reward import answer_scores
from tests.tasks.test_statistics import size
from tests.tiny import random_pairs, random_rows, tiny_model, write_shards

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(str(tiny_model(tmp_path_factory.mktemp("scoring") / "model")), torch.float32, score=True).eval()


def pair(chosen: float, rejected: float, chosen_tokens: int = 5, rejected_tokens: int = 5) -> Pair:
    return ScoredText(chosen, chosen_tokens), ScoredText(rejected, rejected_tokens)


def results(pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    return {name: found.result for name, found in reward_results(pairs).items()}


def test_a_pair_with_equal_scores_is_not_right() -> None:
    found = results([pair(2.0, 1.0), pair(0.5, 0.5), pair(0.0, 3.0)])
    accuracy, margin, score = (found[f"reward_{name}"] for name in ("accuracy", "margin", "score"))
    assert accuracy == {"value": 1 / 3, "low": 0.0, "high": 1.0, "right": 1, "ties": 1, "rows": 3}
    assert margin == {"value": pytest.approx(-2 / 3), "low": -3.0, "high": 1.0, "rows": 3}
    limits = {"low": pytest.approx(0.5), "high": pytest.approx(1.5)}
    assert score == {"value": pytest.approx(7 / 6), **limits, "lowest": 0.0, "highest": 3.0, "rows": 3}


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ProgramError, match="not a number"):
        reward_results([pair(float("nan"), 1.0)])
    with pytest.raises(ProgramError, match="no answers to score"):
        reward_results([])


def test_a_model_that_only_likes_long_answers_is_seen_by_length() -> None:
    lengths = [(4, 20), (20, 4), (10, 9), (9, 10), (30, 10), (5, 6)]
    pairs = [pair(chosen, rejected, chosen, rejected) for chosen, rejected in lengths]  # scores are lengths
    found = {name: (result["value"], result["rows"]) for name, result in results(pairs).items()}
    assert set(found) == set(REWARD_METRICS)
    assert found["reward_accuracy"] == found["longer_is_better_accuracy"] == (0.5, 6)
    assert found["reward_accuracy_chosen_shorter"] == (0.0, 2)
    assert found["reward_accuracy_similar_length"] == (0.5, 2)
    assert found["reward_accuracy_chosen_longer"] == (1.0, 2)
    margins = {name: found[f"reward_margin_{name}"][0] for name in LENGTHS}
    assert margins == {"chosen_shorter": -8.5, "similar_length": 0.0, "chosen_longer": 18.0}
    # answers of one length: the rule of the longer one says nothing, and the other kinds of pairs have no numbers
    found = results([pair(1.0, 0.0)])
    assert found["longer_is_better_accuracy"] == {"value": 0, "low": 0, "high": 0, "right": 0, "ties": 1, "rows": 1}
    assert [name for name in found if name.endswith(("shorter", "longer", "length"))] == [
        "reward_accuracy_similar_length",
        "reward_margin_similar_length",
    ]


def test_calibration_compares_the_share_right_with_what_the_scores_say() -> None:
    found = calibration([2.0, 0.1, -0.1]).result
    assert (found["value"], found["rows"]) == (pytest.approx(0.056387, abs=1e-6), 3)
    assert found["bins"] == [
        {"from": 0.5, "to": 0.55, "rows": 2, "right": 1, "predicted": pytest.approx(0.524979, abs=1e-6)},
        {"from": 0.85, "to": 0.9, "rows": 1, "right": 1, "predicted": pytest.approx(0.880797, abs=1e-6)},
    ]
    far = calibration([1000.0, -1000.0]).result  # beyond the last border, and no overflow
    assert far["bins"] == [{"from": 0.95, "to": 1.0, "rows": 2, "right": 1, "predicted": 1.0}]
    # right as often as it says: sigma(ln 3) = 3/4
    assert calibration([math.log(3)] * 3 + [-math.log(3)]).result["value"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("count", [1, 300])
def test_the_picture_is_a_png_of_sensible_size_and_draws_without_a_warning(count: int) -> None:
    random = numpy.random.default_rng(0)
    pairs = [pair(random.normal(0.4), 0.0, *random.integers(1, 40, 2).tolist()) for _ in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = draw_rewards(results(pairs))
    assert size(png) == (990, 429)
    assert 10_000 < len(png) < 100_000


def test_a_language_model_is_not_taken_for_a_reward_model(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    with pytest.raises(InputError) as caught:
        require_reward_model(folder, "here")
    assert str(caught.value) == (
        "here: the model (LlamaForCausalLM) is no reward model: it gives no score, score.weight is not among its "
        "weights. Name what a stage of kind rm made."
    )
    model = load_base(str(folder), torch.float32, score=True)
    model.save_pretrained(folder)
    require_reward_model(folder, "here")
    model.score = torch.nn.Linear(32, 3, bias=False)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="it gives 3 scores for a text"):
        require_reward_model(folder, "here")


def test_scores_and_lengths_do_not_depend_on_the_batch(scoring: Any, tmp_path: Path) -> None:
    rows = random_pairs(5)
    shards = Shards(write_shards(tmp_path / "pairs", rows, "preference"), "preference")
    one, four = (paired(score_texts(scoring, shards, size)) for size in (1, 4))
    assert len(one) == 5
    for found, other, row in zip(one, four, rows, strict=True):
        border = row["seq_lengths"][0]
        for part, labels in enumerate((row["labels"][:border], row["labels"][border:])):
            assert found[part].score == pytest.approx(other[part].score, abs=1e-5)
            assert found[part].tokens == other[part].tokens == len(labels) - labels.count(-100)


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
