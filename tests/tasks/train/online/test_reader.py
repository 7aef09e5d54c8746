"""A reward model with a tokenizer and a template of its own scores what was said, as it scores it alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.program import ProgramError
from tests.tasks.test_generate_program import write
from tests.tasks.test_win_rate_program import alone, inputs_of, judge, policy, turns  # noqa: F401 - fixtures
from tests.tasks.train.online.runs import numbers, train
from tests.tiny import read_lines

torch.set_num_threads(1)
QUESTIONS = ["Who?", "Why not, and since when?", "When, 敏捷?", "Where?"]


@pytest.fixture
def inputs(policy: Path, judge: Path, tmp_path: Path) -> dict[str, Path]:  # noqa: F811
    """Prompts made by the policy's tokenizer, the rows they were made of, and the judge."""
    rows = [{"instruction": question, "output": ""} for question in QUESTIONS]
    made = inputs_of(policy, write(tmp_path / "rows.jsonl", *rows))
    return {"base": policy, "shards": made["set.0"], "rows": made["rows"], "reward_model": judge}


@pytest.mark.parametrize(
    "stage", [{"stage": "grpo", "num_generations": 2}, {"stage": "ppo"}, {"stage": "ppo", "finetuning_type": "full"}]
)
def test_every_answer_has_the_score_that_the_judge_gives_to_its_text(
    inputs: dict[str, Path],
    tmp_path: Path,
    stage: dict[str, Any],
) -> None:
    folder = tmp_path / "run"
    lines = train(folder, inputs, max_steps=2, sample_steps=1, per_device_train_batch_size=2, micro_batch=1, **stage)
    samples = read_lines(folder / "output" / "report" / "samples.jsonl")
    assert len(samples) >= 2
    for sample in samples:
        question = next(each for each in QUESTIONS if each in sample["prompt"])
        (wanted,) = alone(inputs["reward_model"], [turns(question, sample["answer"])])
        assert sample["score"] == pytest.approx(wanted, abs=6e-5)  # they are written with four digits
    assert [line["step"] for line in lines] == [1, 2]
    assert numbers(folder)["steps"] == 2


def test_an_answer_that_the_judge_cannot_read_ends_the_run_with_the_cure(
    inputs: dict[str, Path],
    tmp_path: Path,
) -> None:
    short = shutil.copytree(inputs["reward_model"], tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    with pytest.raises(
        ProgramError, match=r"cannot read \d of 4 answers: too_long.*Lower cutoff_len or max_new_tokens"
    ):
        train(tmp_path / "run", inputs | {"reward_model": short}, max_steps=1)
