"""What a stage may name as rewards, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from registry.loading import load_recipe
from registry.records import TrainSettings
from registry.reward_rules import RULES


def recipe(folder: Path, **fields: Any) -> dict[str, Any]:
    (folder / "prompts.jsonl").write_text('{"instruction": "hello"}\n')
    stage = {"stage": "ppo", "dataset": str(folder / "prompts.jsonl"), **fields}
    return {"name": "r", "model_name_or_path": "smollm2-135m-instruct", "stages": {"ppo": stage}}


def refusal(folder: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(recipe(folder, **fields))
    return str(error.value)


def test_a_stage_without_any_reward_is_refused(tmp_path: Path) -> None:
    assert "nothing says what a good answer is. Set reward_model" in refusal(tmp_path)


def test_what_is_wrong_with_rewards_is_said_at_once(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        reward_funcs=["lenght", "mine.py:polite", "no_such_module:f", "stopped", "stopped"],
        reward_weights=[1],
    )
    assert "'lenght' is not a known reward function. Did you mean length?" in text
    assert "mine.py:polite: no such file. Write FILE.py:function" in text
    assert "no_such_module:f: there is no module no_such_module" in text
    assert "stopped is named twice" in text
    assert "1 weights for 5 rewards. One for each: the reward model's first" in text


def test_a_file_is_found_beside_the_recipe_and_only_its_name_counts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def polite(completions): ...")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tmp_path, reward_funcs="mine.py:polite,length", reward_weights="1,-0.5")))
    (stage,) = load_recipe(str(file)).stages
    assert stage.train.reward_funcs == (f"{tmp_path}/mine.py:polite", "length")
    assert stage.train.identity()["reward_funcs"] == ["mine.py:polite", "length"]
    assert stage.train.identity()["reward_weights"] == [1.0, -0.5]


def test_every_reward_has_the_weight_1_unless_it_is_given() -> None:
    fields = {"stage": "ppo", "reward_model": "rm", "reward_funcs": ("length", "stopped")}
    assert TrainSettings(**fields).identity()["reward_weights"] == [1.0, 1.0, 1.0]
    assert "reward_model" not in TrainSettings(**fields).identity()  # which model it means is said by an input


def test_rules_give_what_they_say() -> None:
    assert RULES["length"].score("hi there", 8, True, None, 32) == 0.25
    assert [RULES["stopped"].score("", 1, stopped, None, 32) for stopped in (True, False)] == [1.0, 0.0]
    assert [RULES["exact_match"].score(" 42\n", 1, True, answer, 32) for answer in ("42", "43", None)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"packing": True}, "every prompt is answered on its own"),
        ({"lora_dropout": 0.1}, "dropout would move the probabilities"),
        ({"deepspeed": "zero3"}, "deepspeed: the stage divides optimizer state and gradients by itself"),
        ({"deepspeed": "zero2_offload"}, "Use deepspeed: zero2, or zero1."),
        ({"fsdp": True}, "Use deepspeed: zero2, which divides optimizer state and gradients."),
        ({"overlong": "truncate"}, "has lost the place where its answer begins"),
        ({"val_size": 0.1}, "val_size has no effect with stage ppo"),
        ({"eval_steps": 2}, "eval_steps has no effect with stage ppo"),
        ({"temperature": 0.0}, "should be greater than 0"),
        ({"top_p": 1.5}, "should be less than or equal to 1"),
        ({"pref_beta": 0.2}, "pref_beta has no effect with stage ppo"),
    ],
)
def test_what_has_no_place_in_ppo_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, reward_funcs=["length"], **fields)


def test_settings_of_ppo_are_refused_elsewhere(tmp_path: Path) -> None:
    raw = recipe(tmp_path, kl_coef=0.1)
    raw["stages"]["ppo"]["stage"] = "dpo"
    with pytest.raises(InputError, match="kl_coef has no effect with stage dpo"):
        load_recipe(raw)


def test_the_answers_of_a_step_are_whole_groups(tmp_path: Path) -> None:
    rule = (
        r"the 6 answers of a step cannot be dealt out to prompts with 4 each. "
        r"Make per device x accumulation x processes x ppo_buffer_size a multiple of 4"
    )
    fields = {"reward_funcs": ["length"], "stage": "rloo", "per_device_train_batch_size": 3}
    assert rule in refusal(tmp_path, **fields, ppo_buffer_size=2)
    (stage,) = load_recipe(recipe(tmp_path, **fields, gradient_accumulation_steps=4)).stages
    assert (stage.train.num_generations, stage.train.ppo_epochs) == (4, 1)
    assert "gamma has no effect with stage rloo" in refusal(tmp_path, **fields, ppo_buffer_size=4, gamma=0.9)
    assert "loss_type has no effect with stage rloo" in refusal(tmp_path, **fields, ppo_buffer_size=4, loss_type="grpo")
    assert "num_generations has no effect with stage ppo" in refusal(
        tmp_path, reward_funcs=["length"], num_generations=2
    )
