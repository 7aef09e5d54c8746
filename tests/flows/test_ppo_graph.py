"""What stage ppo is connected to: whose weights it shares, whose it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli.exporting import Wanted, _stage
from flows.graph import Pipeline, build
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from tests.flows.test_chains import write_pairs
from tests.flows.toy import toy_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_recipe(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", 6, "pair")
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "say row 1"}\n')
    return tmp_path


def rlhf(folder: Path, rm: dict[str, Any] | None = None, **ppo: Any) -> Pipeline:
    stages = {
        "sft": {"stage": "sft", "dataset": str(folder / "train.jsonl")},
        "rm": {"stage": "rm", "model": "sft", "dataset": str(folder / "pairs.jsonl")} | (rm or {}),
        "ppo": {"stage": "ppo", "model": "sft", "reward_model": "rm", "dataset": str(folder / "prompts.jsonl")} | ppo,
    }
    stages = {name: {k: v for k, v in stage.items() if v is not None} for name, stage in stages.items()}
    raw = {"name": "rlhf", "model_name_or_path": str(folder / "model"), "stages": stages}
    return build(load_recipe(raw), Home.open())


def test_a_reward_model_of_the_same_weights_comes_as_its_adapter(folder: Path) -> None:
    pipeline = rlhf(folder)
    inputs = pipeline.stages["ppo"].trained.inputs
    assert inputs["base"].source is pipeline.stages["sft"].model
    assert inputs["reward_adapter"].source is pipeline.stages["rm"].trained
    assert "reward_model" not in inputs
    assert [stage.name for stage in pipeline.recipe.stages] == ["sft", "rm", "ppo"]


@pytest.mark.parametrize(
    ("rm", "ppo"),
    [
        ({"model": None}, {}),  # of the base, not of sft's model
        ({"finetuning_type": "full"}, {}),
        ({}, {"finetuning_type": "full"}),
        ({"additional_target": ["embed_tokens"]}, {}),
    ],
    ids=["another-base", "full-rm", "full-ppo", "whole-modules"],
)
def test_another_one_comes_whole(folder: Path, rm: dict[str, Any], ppo: dict[str, Any]) -> None:
    pipeline = rlhf(folder, rm, **ppo)
    inputs = pipeline.stages["ppo"].trained.inputs
    assert inputs["reward_model"].source is pipeline.stages["rm"].model
    assert "reward_adapter" not in inputs
    # where it turns out to have a tokenizer of its own, it reads the rows as it read them when it was trained
    assert inputs["rows"].source is next(step for step in pipeline.steps if step.title == "ppo/fetch")
    assert pipeline.stages["ppo"].trained.identity["reading"] == {
        "template": None,
        "default_system": None,
        "enable_thinking": None,
        "control_tokens": "plain",
    }


def test_a_stage_that_makes_no_reward_model_is_refused(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"stages\.ppo\.reward_model: stage sft is of kind sft.*Name a stage with stage: rm"
    ):
        rlhf(folder, reward_model="sft")


def test_the_code_of_a_reward_counts_and_its_place_does_not(folder: Path) -> None:
    keys = []
    for name, text in (
        ("a", "def f(completions): ..."),
        ("b", "def f(completions): ..."),
        ("c", "def f(prompts): ..."),
    ):
        (folder / name).mkdir()
        (folder / name / "mine.py").write_text(text)
        step = rlhf(folder, reward_funcs=[f"{folder / name / 'mine.py'}:f"]).stages["ppo"].trained
        keys.append(json.dumps(step.identity, sort_keys=True))
        assert step.runtime["reward_files"] == {"mine.py:f": str(folder / name / "mine.py")}
    assert keys[0] == keys[1] != keys[2]


def test_prompts_are_rows_of_prompts(folder: Path) -> None:
    stage = rlhf(folder).stages["ppo"]
    assert stage.rendered.identity["shape"] == "prompt"
    assert stage.tokenized.identity["packing"] is False


def test_a_model_that_is_not_there_is_named_by_its_key(folder: Path) -> None:
    with pytest.raises(InputError, match=r"stages\.ppo\.reward_model: the folder /no/such does not exist"):
        rlhf(folder, reward_model="/no/such")
    with pytest.raises(InputError, match=r"stages\.ppo\.ref_model: the folder /no/such does not exist"):
        rlhf(folder, ref_model="/no/such")


def test_a_reward_model_is_not_where_a_chain_ends(folder: Path) -> None:
    assert _stage(rlhf(folder), Wanted()) == "ppo"
