"""The four roles: who shares the base, and that sharing changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.program import ProgramError, Spec
from tasks.train.loading import load_base
from tasks.train.online.inputs import Answered, make_inputs
from tasks.train.online.roles import Roles, make_roles
from tasks.train.online.rollout import Sampling
from tasks.train.online.scoring import score, token_logps
from tasks.train.reward import answer_scores
from tests.tasks.train.online.runs import make_spec
from tests.tasks.train.test_methods import merge
from tests.tasks.train.test_methods import train as train_stage
from tests.tiny import tiny_model

torch.set_num_threads(1)
CPU = torch.device("cpu")
ANSWERS = [
    Answered(0, [72, 105, 259], [97, 98, 260], True, None),
    Answered(1, [72, 259], [120, 121, 122, 123, 124], False, None),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, the adapter of a reward model trained on it, and that model merged."""
    folder = tmp_path_factory.mktemp("roles")
    base = tiny_model(folder / "base")
    adapter = train_stage(folder / "rm", base, "rm", lora_rank=4)
    return {"base": base, "adapter": adapter, "merged": merge(folder / "merge", base, adapter)}


def roles_of(folder: Path, inputs: dict[str, Path], **fields: Any) -> Roles:
    return make_roles(Spec.read(make_spec(folder, inputs, **fields)), {})


def shared(folder: Path, made: dict[str, Path], **fields: Any) -> Roles:
    return roles_of(folder, {"base": made["base"], "reward_adapter": made["adapter"]}, **fields)


def test_with_a_reward_model_of_the_same_base_one_copy_of_it_serves_all_four(
    made: dict[str, Path], tmp_path: Path
) -> None:
    roles = shared(tmp_path / "run", made)
    assert roles.shared
    assert roles.sentence() == "policy, reference, critic and reward model share one copy of the base weights"
    assert roles.reference.frozen is None
    assert roles.critic.model is roles.policy
    plain = sum(value.numel() for name, value in roles.policy.named_parameters() if ".lora_" not in name)
    assert plain == sum(value.numel() for value in AutoModelForCausalLM.from_pretrained(made["base"]).parameters())


def test_the_shared_reward_model_scores_as_the_merged_one_does(made: dict[str, Path], tmp_path: Path) -> None:
    inputs = make_inputs(ANSWERS, CPU, False)
    merged = load_base(str(made["merged"]), torch.float32, score=True)
    wanted = answer_scores(merged, inputs.arguments(merged) | {"labels": inputs.labels})
    roles = shared(tmp_path / "run", made)
    found = torch.tensor([item.score for item in score(roles, ANSWERS, Sampling())])
    torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-5)
    alone = torch.tensor([score(roles, [item], Sampling())[0].score for item in ANSWERS])
    torch.testing.assert_close(alone, found, atol=1e-5, rtol=1e-5)
    own = roles_of(tmp_path / "own", {"base": made["base"], "reward_model": made["merged"]}, finetuning_type="full")
    assert not own.shared
    assert own.sentence() == "models of their own beside the policy: the reference, the critic, the reward model"
    torch.testing.assert_close(
        torch.tensor([item.score for item in score(own, ANSWERS, Sampling())]), found, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_critic_begins_as_the_reward_model(made: dict[str, Path], tmp_path: Path, method: str) -> None:
    reward = {"reward_adapter": made["adapter"]} if method == "lora" else {"reward_model": made["merged"]}
    roles = roles_of(tmp_path / "run", {"base": made["base"]} | reward, finetuning_type=method)
    inputs = make_inputs(ANSWERS, CPU, False)
    assert roles.reward is not None
    with torch.no_grad():
        with roles.critic.active():
            expected = roles.critic(inputs, inputs.ends())
        with roles.reward.active():
            scores = roles.reward(inputs, inputs.ends())
    torch.testing.assert_close(expected, scores, atol=1e-6, rtol=1e-6)


def test_without_a_reward_model_the_critic_begins_by_expecting_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    for method in ("lora", "full", "freeze"):
        fields = {"freeze_trainable_layers": 1} if method == "freeze" else {}
        roles = roles_of(tmp_path / method, {"base": made["base"]}, finetuning_type=method, **fields)
        assert {value for item in score(roles, ANSWERS, Sampling()) for value in item.values} == {0.0}
        assert roles.critic.head.weight.requires_grad


def test_the_reference_and_the_reward_model_stay_what_they_are_while_the_policy_and_the_critic_move(
    made: dict[str, Path], tmp_path: Path
) -> None:
    roles = shared(tmp_path / "run", made)
    before = score(roles, ANSWERS, Sampling())
    plain = AutoModelForCausalLM.from_pretrained(made["base"])
    bare = token_logps(plain, make_inputs(ANSWERS, CPU, False), Sampling())
    torch.manual_seed(0)
    moved = [value for name, value in roles.policy.named_parameters() if ".default." in name or ".critic." in name]
    for value in moved:
        value.data += 0.3 * torch.randn_like(value)
    after = score(roles, ANSWERS, Sampling())
    assert [item.reference for item in after] == [item.reference for item in before]
    assert [item.score for item in after] == [item.score for item in before]
    assert all(now.logps != then.logps for now, then in zip(after, before, strict=True))
    assert all(now.values != then.values for now, then in zip(after, before, strict=True))
    reference = torch.tensor([value for item in after for value in item.reference])
    torch.testing.assert_close(reference, bare.detach(), atol=1e-6, rtol=1e-6)


def test_what_policy_and_critic_train_is_each_ones_own(made: dict[str, Path], tmp_path: Path) -> None:
    roles = shared(tmp_path / "run", made)
    policy = {name for name, value in roles.policy.named_parameters() if value.requires_grad}
    critic = roles.critic.parameters()
    assert policy
    assert all(".default." in name for name in policy)
    assert all(".critic." in name or name == "score.weight" for name in critic)
    inputs = make_inputs(ANSWERS, CPU, False)
    with roles.critic.active():
        roles.critic(inputs, inputs.drawn_from()).sum().backward()
    assert all(value.grad is not None for value in critic.values())
    assert all(value.grad is None for name, value in roles.policy.named_parameters() if ".critic." not in name)
    token_logps(roles.policy, inputs, Sampling()).sum().backward()
    with_gradient = {name for name, value in roles.policy.named_parameters() if value.grad is not None}
    assert with_gradient == policy | (critic.keys() - {"score.weight"})


def test_an_adapter_that_is_continued_is_its_own_reference(made: dict[str, Path], tmp_path: Path) -> None:
    sft = train_stage(tmp_path / "sft", made["base"], "sft", lora_rank=4)
    inputs = {"base": made["base"], "reward_adapter": made["adapter"], "adapter": sft}
    roles = roles_of(tmp_path / "run", inputs)
    found = score(roles, ANSWERS, Sampling())
    assert [item.logps for item in found] == [item.reference for item in found]
    bare = score(shared(tmp_path / "bare", made), ANSWERS, Sampling())
    assert [item.score for item in found] == [item.score for item in bare]  # the reward model's base has no adapter
    assert [item.logps for item in found] != [item.logps for item in bare]


@pytest.mark.parametrize("fields", [{"quant_bit": 4}, {"bf16": True}, {"use_dora": True}])
def test_policy_and_reference_are_equal_at_the_start(
    made: dict[str, Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    base = (
        tiny_model(tmp_path / "wide", hidden_size=64, intermediate_size=128) if "quant_bit" in fields else made["base"]
    )
    roles = roles_of(tmp_path / "run", {"base": base}, **fields)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(fields.get("bf16"))):
        found = score(roles, ANSWERS, Sampling())
    assert [item.logps for item in found] == [item.reference for item in found]


def other_base(folder: Path) -> None:
    (folder / "base.json").write_text(json.dumps({"base_digest": "base-1"}))


def no_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in state.items() if "score" not in name}, folder / "adapter_model.safetensors"
    )


def lost_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "adapter_model.safetensors")
    state.pop(next(name for name in state if "lora_B" in name))
    save_file(state, folder / "adapter_model.safetensors")


def whole_module(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["embed_tokens", "score"]}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_base, "base-1, this base has base-0"),
        (no_head, "it is no reward model"),
        (lost_tensor, "1 missing"),
        (whole_module, "trained embed_tokens whole"),
    ],
)
def test_an_adapter_that_is_no_reward_model_for_this_base_is_refused(
    made: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = shutil.copytree(made["adapter"], tmp_path / "adapter")
    damage(folder)
    with pytest.raises(ProgramError, match=words) as caught:
        roles_of(tmp_path / "run", {"base": made["base"], "reward_adapter": folder})
    assert caught.value.kind == "bad_setting"
