"""From scores to advantages, with the numbers of the module's own example."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from tasks.train.online.advantages import (
    RunningScores,
    advantages_of,
    answer_mask,
    k3,
    log_ratio,
    next_coefficient,
    token_rewards,
    whiten,
)

EOS, PAD = 2, 0
ANSWER = torch.tensor([[11, 12, EOS, PAD, PAD]])
LOGPS = torch.tensor([[-1.0, -1.0, -1.0, 9.0, 9.0]])
REFERENCE = torch.tensor([[-1.5, -0.5, -1.0, -9.0, -9.0]])
VALUES = torch.tensor([[0.1, 0.2, 0.3, 7.0, -7.0]])


def test_the_example_has_the_rewards_and_advantages_worked_out_by_hand() -> None:
    mask = answer_mask(ANSWER, frozenset({EOS}))
    ratio = log_ratio(LOGPS, REFERENCE, mask)
    rewards = token_rewards(ratio, mask, torch.tensor([2.0]), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.05, 2.0, 0.0, 0.0]]))
    assert float(k3(ratio[mask]).mean()) == pytest.approx(0.085084, abs=1e-6)
    advantages = advantages_of(rewards, VALUES, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[1.72675, 1.765, 1.7, 0.0, 0.0]]))


def test_padding_and_batch_mates_have_no_influence() -> None:
    alone = _advantages(ANSWER[:, :3], LOGPS[:, :3], REFERENCE[:, :3], VALUES[:, :3], [2.0])
    mates = torch.tensor([[5, EOS, PAD, PAD, PAD, PAD, PAD], [5, 6, 7, 8, 9, 10, 11]])
    wide = torch.nn.functional.pad(ANSWER, (0, 2))
    numbers = [torch.nn.functional.pad(values, (0, 2), value=3.0) for values in (LOGPS, REFERENCE, VALUES)]
    others = torch.linspace(-2, 1, 14).reshape(2, 7)
    batch = [torch.cat([values, others * scale]) for scale, values in zip((1.0, 0.7, 0.3), numbers, strict=True)]
    found = _advantages(torch.cat([wide, mates]), *batch, [2.0, -1.0, 5.0])
    assert torch.equal(found[0, :3], alone[0])
    assert torch.equal(found[0, 3:], torch.zeros(4))
    assert torch.equal(found[1, 2:], torch.zeros(5))


def _advantages(
    ids: torch.Tensor, logps: torch.Tensor, reference: torch.Tensor, values: torch.Tensor, scores: list[float]
) -> torch.Tensor:
    mask = answer_mask(ids, frozenset({EOS}))
    rewards = token_rewards(log_ratio(logps, reference, mask), mask, torch.tensor(scores), 0.1)
    return advantages_of(rewards, values, mask, 1.0, 0.95)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_discounted_sum_of_what_each_later_token_brought(gamma: float, lam: float) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    lengths = [6, 4, 1]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    found = advantages_of(torch.where(mask, rewards, 0.0), values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        reward, value = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            slow = sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, length))
            assert float(found[row, t]) == pytest.approx(slow, abs=1e-5)


def test_the_score_is_on_the_terminator_and_on_the_last_token_of_a_cut_answer() -> None:
    mask = answer_mask(torch.tensor([[4, EOS, 4, EOS], [4, 4, 4, 4]]), frozenset({EOS}))
    rewards = token_rewards(torch.zeros(2, 4), mask, torch.tensor([1.5, -2.0]), 0.1)
    assert rewards.tolist() == [[0.0, 1.5, 0.0, 0.0], [0.0, 0.0, 0.0, -2.0]]


def test_whitening_looks_at_real_tokens_only() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.tensor([[1.0, 2.0, 99.0], [6.0, -99.0, 99.0]])
    real = [1.0, 2.0, 6.0]
    found, kept = whiten(values, mask), whiten(values, mask, shift=False)
    slow = [(value - 3.0) / math.sqrt(statistics.variance(real)) for value in real]
    assert found[mask].tolist() == pytest.approx(slow, abs=1e-6)
    assert kept[mask].tolist() == pytest.approx([value + 3.0 for value in slow], abs=1e-6)
    assert found[~mask].abs().sum() == kept[~mask].abs().sum() == 0
    assert whiten(torch.tensor([[5.0]]), torch.tensor([[True]])).tolist() == [[0.0]]
    assert whiten(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)).tolist() == [[0.0] * 3] * 2


def test_the_estimate_k3_is_never_negative_and_k1_is() -> None:
    ratio = torch.linspace(-4, 4, 81)
    assert float(k3(ratio).min()) >= 0.0
    assert float(ratio.min()) < 0.0


def test_the_coefficient_is_steered_to_the_target() -> None:
    assert next_coefficient(0.2, 6.0, 6.0) == 0.2
    assert next_coefficient(0.2, 60.0, 6.0) == pytest.approx(0.204)  # an error of 9 counts as 0.2
    assert next_coefficient(0.2, 0.0, 6.0) == pytest.approx(0.196)
    assert next_coefficient(0.2, 6.3, 6.0) == pytest.approx(0.201)
    assert next_coefficient(0.2, 6.3, None) == 0.2


def test_running_scores_are_those_of_all_scores_at_once() -> None:
    parts = [[1.0, 2.0, 4.0], [10.0], [-3.0, 0.5]]
    running = RunningScores()
    for part in parts:
        running.add(torch.tensor(part))
    everything = [value for part in parts for value in part]
    assert running.mean == pytest.approx(statistics.mean(everything))
    found = running.normalised(torch.tensor([4.0]))
    assert float(found) == pytest.approx((4.0 - running.mean) / statistics.stdev(everything), abs=1e-6)
    alone = RunningScores()
    alone.add(torch.tensor([3.0]))
    assert alone.normalised(torch.tensor([3.0])).tolist() == [0.0]
