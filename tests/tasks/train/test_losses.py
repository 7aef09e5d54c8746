"""The losses over compared answers: literal values, and TRL's own trainers on the same rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.train.compared import collate_pairs, with_answer_of
from tasks.train.likelihood import sequence_logps
from tasks.train.losses import PAIR_LOSSES, Pairs, bradley_terry, kto, log_odds, odds_ratio, off_centre, sigmoid
from tasks.train.objectives import PairPreference, RewardModelling
from tasks.train.reference import Reference
from tasks.train.reward import answer_scores, load_scoring
from tests.tiny import random_pairs, tiny_model

torch.set_num_threads(1)
ONE = tensor([1.0])


def pairs(chosen: float, rejected: float, chosen_tokens: int = 4, rejected_tokens: int = 2) -> Pairs:
    values = (chosen, rejected, float(chosen_tokens), float(rejected_tokens))
    return Pairs(*(tensor([value]) for value in values))


def test_a_pair_ahead_by_three_halves_has_this_loss() -> None:
    # policy -10 and -12, reference -11 and -11.5
    assert sigmoid(pairs(-10 + 11, -12 + 11.5), 0.1, 0.0, 0.0).item() == pytest.approx(0.620957, abs=1e-6)
    assert sigmoid(pairs(0.0, 0.0), 0.1, 0.0, 0.0).item() == pytest.approx(0.693147, abs=1e-6)


def test_log_odds_are_finite_near_certainty_and_right_in_low_precision() -> None:
    for kind in (torch.float32, torch.bfloat16):
        found = log_odds(tensor([-1e-6, -0.5, 0.0, -50.0], dtype=kind))
        assert found.dtype == torch.float32
        assert found[:2].tolist() == pytest.approx([13.8155, 0.43275], abs=2e-3)
        assert torch.isfinite(found).all()


def test_the_gradient_of_log_odds_is_finite_everywhere() -> None:
    means = tensor([0.0, -1e-9, -1e-6, -0.3, -math.log(2), -0.9, -80.0], requires_grad=True)
    log_odds(means).sum().backward()
    assert torch.isfinite(means.grad).all()
    # d/dx log(p / (1 - p)) = 1 / (1 - p)
    assert means.grad[3].item() == pytest.approx(1 / (1 - math.exp(-0.3)), rel=1e-5)


def test_equal_odds_cost_ln_two() -> None:
    assert odds_ratio(tensor([-0.7]), tensor([-0.7])).item() == pytest.approx(math.log(2), abs=1e-6)


def test_marked_answers_have_these_losses() -> None:
    ratio, good = tensor([2.0, -2.0]), tensor([True, False])
    assert kto(ratio, good, tensor(0.0), 0.1, (1.0, 1.0)).tolist() == pytest.approx([0.450166, 0.450166], abs=1e-6)
    # a distance of 1 makes the good answer's lead smaller and the bad one's larger: sigma(-0.1), sigma(-0.3)
    found = kto(ratio, good, tensor(1.0), 0.1, (2.0, 3.0)).tolist()
    assert found == pytest.approx([2 * 0.475021, 3 * 0.425557], abs=1e-5)


def test_a_margin_is_taken_off_the_lead_of_the_better_answer() -> None:
    assert bradley_terry(2 * ONE, ONE, 0 * ONE).item() == pytest.approx(0.313262, abs=1e-6)
    assert bradley_terry(2 * ONE, ONE, ONE).item() == pytest.approx(0.693147, abs=1e-6)


def test_scores_away_from_zero_cost_the_square_of_their_sum() -> None:
    # 2 and 1: ln(1 + e^-1) + 0.01 x 9; 1.5 and -1.5 are around 0 already
    chosen, rejected = tensor([2.0, 1.5], requires_grad=True), tensor([1.0, -1.5])
    assert off_centre(chosen, rejected).tolist() == [9.0, 0.0]
    losses = bradley_terry(chosen, rejected, tensor([0.0, 0.0])) + 0.01 * off_centre(chosen, rejected)
    assert losses.tolist() == pytest.approx([0.403262, 0.048587], abs=1e-6)
    losses.sum().backward()  # -sigma(-1) + 0.01 x 2 x 3, and -sigma(-3)
    assert chosen.grad.tolist() == pytest.approx([-0.208941, -0.047426], abs=1e-6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("losses")
    return tiny_model(folder / "policy"), tiny_model(folder / "reference", seed=1)


def rows(count: int = 3) -> list[dict[str, Any]]:
    from numpy import array

    found = []
    for number, pair in enumerate(random_pairs(count)):
        found.append({name: array(value) for name, value in pair.items()} | {"row": number, "mark": None})
    return found


def plain_logps(model: Any, ids: list[int], labels: list[int]) -> float:
    """Log-probability of the trained tokens of one row, by the slow way."""
    logps = model(input_ids=tensor([ids])).logits.float().log_softmax(-1)[0]
    return sum(logps[i - 1, label].item() for i, label in enumerate(labels) if i and label != -100)


def test_pads_and_neighbours_do_not_change_the_likelihood_of_an_answer(models: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models[0]).eval()
    batch = collate_pairs(rows())
    arguments = {name: batch.inputs[name] for name in ("input_ids", "labels", "attention_mask", "use_cache")}
    with torch.no_grad():
        found, counts = sequence_logps(model, arguments)
        wanted = []
        for part in (0, 1):
            for row in rows():
                cut = slice(0, int(row["seq_lengths"][0])) if part == 0 else slice(int(row["seq_lengths"][0]), None)
                wanted.append(plain_logps(model, row["input_ids"][cut].tolist(), row["labels"][cut].tolist()))
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert counts.tolist() == (batch.inputs["labels"] != -100).sum(dim=1).tolist()


def trl_inputs(batch: Any) -> dict[str, Any]:
    return {
        "input_ids": batch.inputs["input_ids"],
        "attention_mask": batch.inputs["attention_mask"],
        "completion_mask": (batch.inputs["labels"] != -100).long(),
    }


def trl_loss(models: tuple[Path, Path], tmp_path: Path, batch: Any, name: str, smoothing: float) -> float:
    """The mean loss of TRL's trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(models[0]),
        ref_model=AutoModelForCausalLM.from_pretrained(models[1]),
        args=DPOConfig(
            output_dir=str(tmp_path),
            loss_type=[name],
            label_smoothing=smoothing,
            beta=0.3,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    return float(trainer._compute_loss(trainer.model, trl_inputs(batch), return_outputs=False))


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - {"simpo"}))
def test_every_loss_is_the_one_of_trl(models: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    smoothing = 0.1 if name in ("robust", "exo_pair") else 0.0
    policy = AutoModelForCausalLM.from_pretrained(models[0])
    settings = {"stage": "dpo", "pref_loss": name, "pref_beta": 0.3, "pref_ftx": 0.0, "dpo_label_smoothing": smoothing}
    batch = collate_pairs(rows())
    reference = Reference(policy, AutoModelForCausalLM.from_pretrained(models[1]))
    ours = PairPreference(settings, reference).sums(policy, dict(batch.inputs)).loss["pairs"].item() / 3
    assert ours == pytest.approx(trl_loss(models, tmp_path, batch, name, smoothing), rel=1e-4)


@pytest.mark.parametrize("coefficient", [None, 0.3])
def test_the_loss_of_a_reward_model_is_the_one_of_trl(
    models: tuple[Path, Path], tmp_path: Path, coefficient: float | None
) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    batch = collate_pairs(rows())
    batch.inputs["margin"] = tensor([0.0, 0.5, 1.0])
    model = load_scoring(str(models[0]), torch.float32)
    settings = {} if coefficient is None else {"center_rewards_coefficient": coefficient}
    ours = RewardModelling(settings).sums(model, dict(batch.inputs)).loss["pairs"] / 3
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(tmp_path),
            center_rewards_coefficient=coefficient,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"chosen_ids": [1, 2], "rejected_ids": [1, 3]}]),
        processing_class=AutoTokenizer.from_pretrained(models[0]),
    )
    given = {name: batch.inputs[name] for name in ("input_ids", "attention_mask", "margin")}
    given["input_ids"][given["attention_mask"] == 0] = model.config.pad_token_id  # by which TRL's model finds the end
    assert ours.item() == pytest.approx(float(trainer.compute_loss(model, given)), rel=1e-5)


def test_simpo_compares_likelihoods_per_token() -> None:
    # beta 2, gamma 0.5: mean log-probabilities -1 and -2 -> -log sigma(2 - 0.5)
    found = PAIR_LOSSES["simpo"](pairs(-4.0, -4.0), 2.0, 0.0, 0.5)
    assert found.item() == pytest.approx(0.201413, abs=1e-6)


def test_the_answer_of_another_row_follows_this_rows_prompt() -> None:
    one, two = (
        {name: value for name, value in row.items() if name in ("input_ids", "labels")}
        for row in (
            {"input_ids": tensor([1, 2, 3, 4]).numpy(), "labels": tensor([-100, -100, 3, 4]).numpy()},
            {"input_ids": tensor([5, 6, 7]).numpy(), "labels": tensor([-100, 6, 7]).numpy()},
        )
    )
    mixed = with_answer_of(one, two)
    assert mixed["input_ids"].tolist() == [1, 2, 6, 7]
    assert mixed["labels"].tolist() == [-100, -100, 6, 7]


def test_a_score_is_read_at_the_last_trained_token_whatever_follows_it(models: tuple[Path, Path]) -> None:
    model = load_scoring(str(models[0]), torch.float32).eval()
    ids, end = [7, 8, 9, 260], 260
    with torch.no_grad():
        hidden = model.model(input_ids=tensor([ids])).last_hidden_state[0]
        wanted = model.score(hidden)[:, 0]
        for pad in (0, end, model.config.pad_token_id):  # the pad token that ends answers as well
            inputs = {
                "input_ids": tensor([[*ids, pad, pad], [7, 8, 9, 260, 5, 6]]),
                "labels": tensor([[-100, -100, 9, 260, -100, -100], [-100, -100, 9, -100, -100, -100]]),
                "attention_mask": tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
            }
            found = answer_scores(model, inputs).tolist()
            assert found == pytest.approx([wanted[3].item(), wanted[2].item()], rel=1e-4)
    assert model.config.pad_token_id != end
