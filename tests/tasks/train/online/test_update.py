"""What policy and critic learn from a step: losses by hand, and independence of how a step is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from registry.records import TrainSettings
from tasks.program import ProgramError, Spec
from tasks.train.online.advantages import RunningScores
from tasks.train.online.experience import explained_variance, final_scores, learn_from
from tasks.train.online.inputs import Answered, make_inputs
from tasks.train.online.losses import policy_loss, value_loss
from tasks.train.online.moved import Moved
from tasks.train.online.roles import Roles, make_roles
from tasks.train.online.rollout import Sampling
from tasks.train.online.scoring import drawn_logits, entropies, score, token_logps
from tasks.train.online.update import Update, micro_batches, mini_batches
from tests.tasks.train.online.runs import LOW, make_spec
from tests.tiny import tiny_model

torch.set_num_threads(1)
ANSWERS = [
    Answered(0, [72, 105, 259], [97, 98, 260], True, None),
    Answered(1, [72, 259], [120, 121, 122, 123, 124], False, None),
    Answered(2, [1, 2, 3, 4, 5, 259], [260], True, None),
    Answered(3, [50, 51, 52, 53, 259], [9, 8, 260], True, None),
]
SCORES = torch.tensor([1.0, -0.5, 0.25, 2.0])


class Alone:
    """One process."""

    index, count = 0, 1

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def sum_for(self, owner: int, value: torch.Tensor) -> None:
        raise AssertionError("nothing is divided")

    share = sum_for

    def autocast(self) -> Any:
        return torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("update") / "base")


def settings(**fields: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"stage": "ppo", "reward_funcs": (LOW,), "per_device_train_batch_size": 4, "ppo_epochs": 1}
    return TrainSettings(**(given | fields)).identity()


def roles_of(folder: Path, base: Path, **fields: Any) -> Roles:
    return make_roles(Spec.read(make_spec(folder, {"base": base}, **fields)), {})


def gradients(folder: Path, base: Path, micro_batch: int, answers: list[Answered]) -> dict[str, torch.Tensor]:
    """Gradients of policy and critic from one mini-batch, before anything moves."""
    roles = roles_of(folder, base, finetuning_type="full", seed=1)
    moved = {
        name: Moved(values, torch.optim.SGD(values.values(), lr=0.0), Alone())
        for name, values in (
            ("policy", dict(roles.policy.named_parameters())),
            ("critic", roles.critic.parameters()),
        )
    }
    update = Update(roles, moved, settings(max_grad_norm=1e9), micro_batch, Alone())
    scored = [score(roles, [item], Sampling())[0] for item in answers]
    experience = learn_from(answers, scored, SCORES, settings(kl_coef=0.1), 0.1, RunningScores())
    kept: dict[str, torch.Tensor] = {}
    for role, values in moved.items():
        for name, value in values.parameters.items():
            value.register_hook(lambda grad, name=f"{role}.{name}": kept.__setitem__(name, kept.get(name, 0) + grad))
    update(experience, 1)
    return kept


def test_losses_are_those_worked_out_by_hand() -> None:
    losses, clipped = policy_loss(torch.tensor([0.5, -0.5, 0.1]), torch.tensor([1.0, 1.0, -1.0]), 0.2)
    assert losses.tolist() == pytest.approx([-1.2, -0.606531, 1.105171], abs=1e-6)
    assert clipped.tolist() == [True, False, False]
    losses, clipped = value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([2.0, 1.0]), 0.2)
    assert losses.tolist() == pytest.approx([1.62, 0.405])
    assert clipped.tolist() == [True, False]


def test_a_ratio_far_away_is_no_infinity() -> None:
    losses, _ = policy_loss(torch.tensor([500.0]), torch.tensor([-1.0]), 0.2)
    assert losses.isfinite().all()


def test_gradients_do_not_depend_on_how_a_mini_batch_is_split(base: Path, tmp_path: Path) -> None:
    together = gradients(tmp_path / "4", base, 4, ANSWERS)
    for size in (1, 2):
        split = gradients(tmp_path / str(size), base, size, ANSWERS)
        assert split.keys() == together.keys()
        for name, value in together.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(split[name], value, atol=1e-5 * max(scale, 1e-3), rtol=1e-4, msg=name)


def test_log_probabilities_are_those_of_a_plain_slow_loop(base: Path, tmp_path: Path) -> None:
    roles = roles_of(tmp_path / "run", base)
    sampling = Sampling(temperature=0.7, top_k=50)
    logits, targets = drawn_logits(roles.policy, make_inputs(ANSWERS, torch.device("cpu"), False), sampling)
    found = token_logps(roles.policy, make_inputs(ANSWERS, torch.device("cpu"), False), sampling)
    assert targets.tolist() == [token for item in ANSWERS for token in item.answer]
    slow, slow_entropies = [], []
    for item in ANSWERS:
        for at, token in enumerate(item.answer):
            ids = torch.tensor([item.prompt + item.answer[:at]])
            alone = sampling.logits(roles.policy(input_ids=ids).logits[0, -1:].detach(), torch.tensor([token]))[0]
            shares = alone.softmax(0)
            slow.append(float(shares[token].log()))
            slow_entropies.append(-sum(float(share * share.log()) for share in shares if share > 0))
    assert found.tolist() == pytest.approx(slow, abs=1e-5)
    assert entropies(logits).tolist() == pytest.approx(slow_entropies, abs=1e-4)


def test_the_first_pass_of_a_step_has_a_ratio_of_exactly_1_and_another_policy_is_noticed(
    base: Path, tmp_path: Path
) -> None:
    roles = roles_of(tmp_path / "run", base)
    moved = {
        "policy": Moved(
            values := {name: value for name, value in roles.policy.named_parameters() if value.requires_grad},
            torch.optim.SGD(values.values(), lr=0.1),
            Alone(),
        ),
        "critic": Moved(
            values := roles.critic.parameters(),
            torch.optim.SGD(values.values(), lr=0.1),
            Alone(),
        ),
    }
    update = Update(roles, moved, settings(), 4, Alone())
    order = next(mini_batches([len(item) for item in ANSWERS], 4, 0, (0, 1)))
    found = dict(zip(order, score(roles, [ANSWERS[place] for place in order], Sampling()), strict=True))
    scored = [found[place] for place in range(4)]
    experience = learn_from(ANSWERS, scored, SCORES, settings(), 0.05, RunningScores())
    assert update(experience, 1)["first_ratio"] == 1.0
    with pytest.raises(ProgramError, match="differs by"):
        update(experience, 2)


def test_updates_end_where_the_policy_has_gone_far_enough(base: Path, tmp_path: Path) -> None:
    roles = roles_of(tmp_path / "run", base)
    values = {name: value for name, value in roles.policy.named_parameters() if value.requires_grad}
    critic = roles.critic.parameters()
    moved = {
        "policy": Moved(values, torch.optim.Adam(values.values(), lr=0.05), Alone()),
        "critic": Moved(critic, torch.optim.Adam(critic.values(), lr=0.05), Alone()),
    }
    update = Update(roles, moved, settings(ppo_epochs=6, target_kl=0.02), 4, Alone())
    order = next(mini_batches([len(item) for item in ANSWERS], 4, 0, (0, 1)))
    found = dict(zip(order, score(roles, [ANSWERS[place] for place in order], Sampling()), strict=True))
    experience = learn_from(ANSWERS, [found[p] for p in range(4)], SCORES, settings(), 0.05, RunningScores())
    metrics = update(experience, 1)
    assert 1 <= metrics["updates"] < 6
    assert metrics["approx_kl"] > 0.02 / metrics["updates"]


def test_every_answer_is_in_one_mini_batch_and_one_micro_batch_of_one_process() -> None:
    lengths = [5, 3, 9, 2, 7, 7, 1]
    for epoch in (0, 1):
        batches = list(mini_batches(lengths, 4, epoch, (0, 3)))
        assert sorted(place for batch in batches for place in batch) == list(range(7))
        dealt = [
            p for batch in batches for index in range(2) for part in micro_batches(batch, 2, index, 2) for p in part
        ]
        assert sorted(dealt) == list(range(7))
    assert next(mini_batches(lengths, 4, 0, (0, 3))) == [3, 1, 0, 2]  # the first four, by length
    assert list(mini_batches(lengths, 4, 1, (0, 3))) != list(mini_batches(lengths, 4, 2, (0, 3)))


def test_scores_are_normalised_clipped_and_fined_in_that_order() -> None:
    stopped = torch.tensor([True, False, True])
    plain = settings(missing_eos_penalty=1.0, score_clip=1.5)
    assert final_scores(torch.tensor([3.0, 3.0, -9.0]), stopped, plain, RunningScores()).tolist() == [1.5, 0.5, -1.5]
    running = RunningScores()
    found = final_scores(torch.tensor([1.0, 2.0, 3.0]), stopped, settings(ppo_score_norm=True), running)
    assert found.tolist() == [-1.0, 0.0, 1.0]
    assert running.count == 3


def test_explained_variance_is_1_for_a_critic_that_knows_and_0_for_one_that_knows_the_mean() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((3,), 2.0), returns) == 0.0
    assert explained_variance(returns, torch.ones(3)) == 0.0
