"""Stages without a critic: answers compared with others to the same prompt, beside TRL's own trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from registry.records import TrainSettings
from tasks.program import Spec
from tasks.train.online.advantages import RunningScores
from tasks.train.online.experience import Experience, learn_from
from tasks.train.online.groups import group_advantages, group_metrics, leave_one_out
from tasks.train.online.inputs import Answered
from tasks.train.online.losses import kl_loss, of_answers, shares
from tasks.train.online.moved import Moved
from tasks.train.online.roles import Roles, make_roles
from tasks.train.online.rollout import Sampling
from tasks.train.online.scoring import Scored, score
from tasks.train.online.update import Update
from tests.tasks.train.online.runs import LOW, make_spec, train
from tests.tasks.train.online.test_update import Alone
from tests.tiny import read_lines, tiny_model

torch.set_num_threads(1)
SCORES = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
PROMPTS = [[72, 105, 259]] * 2 + [[1, 2, 3, 4, 5, 259]] * 2
TEXTS = [[97, 98, 260], [120, 121, 122, 123, 124], [260], [9, 8, 260]]
ANSWERS = [
    Answered(place // 2, prompt, text, text[-1] == 260, None)
    for place, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True))
]
EARNED = torch.tensor([1.0, -0.5, 0.25, 2.0])
LEARNING: dict[str, Any] = {"finetuning_type": "full", "per_device_train_batch_size": 12, "max_steps": 10}


def settings(stage: str, **fields: Any) -> dict[str, Any]:
    given = {"reward_funcs": (LOW,), "per_device_train_batch_size": 4, "ppo_epochs": 1, "num_generations": 2}
    return TrainSettings(**given | {"stage": stage, "max_new_tokens": 8} | fields).identity()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("groups") / "base")


def test_advantages_are_those_worked_out_by_hand() -> None:
    assert group_advantages(SCORES, 3, "group").tolist() == pytest.approx(
        [-0.755900, -0.377950, 1.133850, 0, 0, 0], abs=1e-5
    )
    assert group_advantages(SCORES, 3, "none").tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    spread = float(SCORES.std())
    assert group_advantages(SCORES, 3, "batch").tolist() == pytest.approx(
        [-2 / spread, -1 / spread, 3 / spread, 0, 0, 0], abs=1e-3
    )
    assert leave_one_out(SCORES, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    assert group_metrics(SCORES, 3) == pytest.approx({"group_score_std": 7**0.5 / 2, "equal_groups": 0.5})


def test_every_mean_gives_tokens_their_part() -> None:
    lengths, batch = torch.tensor([1, 3]), torch.tensor([1, 3])
    given = {"max_new_tokens": 4}
    assert shares({"stage": "ppo"} | given, lengths, batch).tolist() == [0.25] * 4
    assert shares({"stage": "rloo"} | given, lengths, batch).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert shares({"stage": "grpo", "loss_type": "dr_grpo"} | given, lengths, batch).tolist() == [0.125] * 4
    assert of_answers(torch.tensor([1.0, 2.0, 3.0, 4.0]), lengths).tolist() == [1.0, 9.0, 9.0, 9.0]


def test_the_penalty_of_grpo_is_k3_by_the_ratio() -> None:
    found = kl_loss(torch.tensor([0.5, 0.0, -0.5]), torch.tensor([0.5, -0.5, 0.0]))
    assert found.tolist() == pytest.approx([0.175639, 0.148721, 0.0], abs=1e-6)


def learned(folder: Path, base: Path, given: dict[str, Any], micro_batch: int) -> tuple[Experience, dict[str, Any]]:
    """What is learned from, and the loss and gradients of the update; the policy has moved since it drew them."""
    roles = make_roles(Spec.read(make_spec(folder, {"base": base}, finetuning_type="full", stage=given["stage"])), {})
    scored = [score(roles, [item], Sampling())[0] for item in ANSWERS]
    experience = learn_from(ANSWERS, scored, EARNED, given, 0.1, RunningScores())
    moved = move(roles)
    values = dict(moved.named_parameters())
    update = Update(
        roles, {"policy": Moved(values, torch.optim.SGD(values.values(), lr=0.0), Alone())}, given, micro_batch, Alone()
    )
    kept: dict[str, Any] = {}
    for name, value in values.items():
        value.register_hook(lambda grad, name=name: kept.__setitem__(name, kept.get(name, 0) + grad))
    metrics, _ = update._mini_batch(experience, [0, 1, 2, 3], 1, first=False)
    return experience, kept | {"loss": torch.tensor(metrics["policy_loss"])}


def move(roles: Roles) -> Any:
    """Change the policy's weights a little, always in the same way, so that ratios are not 1 and some are clipped."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in roles.policy.parameters():
            value += 0.02 * torch.randn(value.shape, generator=generator)
    return roles.policy


def of_trl(folder: Path, model: Any, given: dict[str, Any], found: Experience) -> dict[str, Tensor]:
    """The loss and gradients of TRL's trainer for the same answers and advantages."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer, config = (GRPOTrainer, GRPOConfig) if given["stage"] == "grpo" else (RLOOTrainer, RLOOConfig)
    own = {"loss_type": given["loss_type"]} if given["stage"] == "grpo" else {}
    arguments = config(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=2, max_completion_length=8, beta=0.1,
        bf16=False, use_cpu=True, report_to=[], **own,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a"}] * 4)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    peer = trainer(
        model, lambda completions, **_: [0.0] * len(completions), arguments, rows, processing_class=tokenizer
    )
    peer.current_gradient_accumulation_steps = 1
    peer.model.eval()
    width = found.mask.shape[1]
    prompt = max(map(len, PROMPTS))
    texts = torch.tensor([text + [260] * (width - len(text)) for text in TEXTS])
    inputs = {
        "prompt_ids": torch.tensor([[260] * (prompt - len(ids)) + ids for ids in PROMPTS]),
        "prompt_mask": torch.tensor([[0] * (prompt - len(ids)) + [1] * len(ids) for ids in PROMPTS]),
        "completion_ids": texts,
        "completion_mask": found.mask.int(),
        "advantages": found.advantages[:, 0],
        "old_per_token_logps": found.logps,
        "old_logps": found.logps.sum(dim=1),
        "ref_per_token_logps": found.reference,
        "num_items_in_batch": found.mask.sum(),
    }
    peer.model.zero_grad()
    loss = peer._compute_loss(peer.model, inputs)
    loss.backward()
    return {name: value.grad for name, value in peer.model.named_parameters()} | {"loss": loss.detach()}


CASES = [
    *({"stage": "grpo", "loss_type": kind} for kind in ("dapo", "grpo", "dr_grpo")),
    {"stage": "grpo", "loss_type": "dapo", "scale_rewards": "none"},
    {"stage": "rloo"},
]


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(fields.values()))
def test_loss_and_gradients_are_those_of_trl_however_a_mini_batch_is_split(
    base: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    given = settings(**fields)
    experience, own = learned(tmp_path / "own", base, given, 4)
    roles = make_roles(Spec.read(make_spec(tmp_path / "trl", {"base": base}, finetuning_type="full", stage="rloo")), {})
    peer = of_trl(tmp_path / "peer", move(roles), given, experience)
    _, split = learned(tmp_path / "split", base, given, 1)
    assert own.keys() == split.keys() == peer.keys()
    for name, value in peer.items():
        scale = max(float(value.abs().max()), 1e-4)
        for other in (own, split):
            torch.testing.assert_close(other[name].to(value.dtype), value, atol=2e-5 * scale, rtol=1e-4, msg=name)


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_it_learns_what_is_rewarded(base: Path, tmp_path: Path, stage: str) -> None:
    """From 12 answers a step, 4 to each of 3 prompts: the share of tokens below 128 rises from a half."""
    fields = LEARNING | {"stage": stage, "kl_coef": 0.0, "num_generations": 4, "ppo_epochs": 3, "learning_rate": 3e-2}
    found = train(tmp_path / "run", {"base": base}, **fields)
    assert found[0]["score"] == pytest.approx(0.5, abs=0.1)
    assert found[-1]["score"] > 0.75
    assert [line["first_ratio"] for line in found] == [1.0] * 10
    assert "value_loss" not in found[0]


def test_a_large_penalty_keeps_it_where_it_is(base: Path, tmp_path: Path) -> None:
    slow = LEARNING | {"stage": "grpo", "num_generations": 4, "ppo_epochs": 2, "learning_rate": 2e-3, "max_steps": 6}
    held = train(tmp_path / "held", {"base": base}, **slow, kl_coef=1e2)[-1]["kl_k3"]
    free = train(tmp_path / "free", {"base": base}, **slow, kl_coef=0.0)[-1]["kl_k3"]
    assert 3 * held < free


@pytest.mark.parametrize(
    ("stage", "wanted"), [("rloo", [-1.6, 1.6, 2.15, -2.15]), ("grpo", [-0.5, 0.5, 1.125, -1.125])]
)
def test_rloo_takes_the_kl_off_the_score_and_grpo_does_not(stage: str, wanted: list[float]) -> None:
    """Scores 1, 2 and 3.25, 1; KL 5, −1 and 0, −1 nats in all, coefficient 0.1; an answer without an end loses 0.5."""
    given = settings(stage, missing_eos_penalty=0.5, **({"scale_rewards": "none"} if stage == "grpo" else {}))
    log_ratios = [[2.0, 2.0, 1.0], [-0.2] * 5, [0.0], [-0.5, -0.5, 0.0]]
    scored = [Scored(row, [0.0] * len(row), None, 0.0, None) for row in log_ratios]
    found = learn_from(ANSWERS, scored, torch.tensor([1.0, 2.5, 3.25, 1.0]), given, 0.1, RunningScores())
    assert found.advantages[:, 0].tolist() == pytest.approx(wanted)
    assert found.advantages[found.mask].tolist() == pytest.approx(
        [wanted[row] for row, item in enumerate(ANSWERS) for _ in item.answer]
    )
    assert not found.advantages[~found.mask].any()


def test_answers_to_one_prompt_stand_together_and_differ(base: Path, tmp_path: Path) -> None:
    fields = {
        "stage": "grpo",
        "num_generations": 2,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "sample_steps": 1,
    }
    train(tmp_path / "run", {"base": base}, **fields)
    rows = read_lines(tmp_path / "run" / "output" / "report" / "samples.jsonl")
    asked = [row["prompt"] for row in rows]
    assert asked[0] == asked[1] != asked[2] == asked[3]
    assert rows[0]["answer"] != rows[1]["answer"]
