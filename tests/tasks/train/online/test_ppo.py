"""Stage ppo as a whole, on a tiny model: it learns, it stays where it is told to, it goes on to the bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.program import OPTIONAL, ProgramError, Spec
from tasks.train.online.program import needed_packages, work
from tasks.train.online.scoring import Held
from tests.tasks.train.online.runs import LOW, contents, lines, make_spec, numbers, train
from tests.tasks.train.test_kills import killed
from tests.tasks.train.test_methods import merge
from tests.tasks.train.test_methods import train as train_stage
from tests.tasks.train.test_training import DyingEvents, Killed
from tests.tiny import read_lines, tiny_model

torch.set_num_threads(1)
LEARNING: dict[str, Any] = {"finetuning_type": "full", "per_device_train_batch_size": 12, "max_steps": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and the adapter of a reward model trained on it."""
    folder = tmp_path_factory.mktemp("ppo")
    base = tiny_model(folder / "base")
    return {"base": base, "adapter": train_stage(folder / "rm", base, "rm", lora_rank=4)}


def shared(made: dict[str, Path]) -> dict[str, Path]:
    return {"base": made["base"], "reward_adapter": made["adapter"]}


def test_it_learns_what_is_rewarded(made: dict[str, Path], tmp_path: Path) -> None:
    """From 12 answers a step: the share of tokens below 128 rises from a half to nine tenths in 12 steps."""
    found = train(tmp_path / "run", {"base": made["base"]}, **LEARNING, kl_coef=0.0)
    assert found[0]["score"] == pytest.approx(0.5, abs=0.1)
    assert found[-1]["score"] > 0.85
    assert [line["first_ratio"] for line in found] == [1.0] * 12
    assert found[-1]["kl"] > 5.0
    assert found[-1]["entropy"] < found[0]["entropy"]


def test_a_large_penalty_keeps_it_where_it_is(made: dict[str, Path], tmp_path: Path) -> None:
    inputs = {"base": made["base"]}
    found = train(tmp_path / "run", inputs, **LEARNING, kl_coef=1e3)
    assert sum(line["score"] for line in found[-4:]) / 4 == pytest.approx(0.5, abs=0.08)  # without: 0.9
    slow = LEARNING | {"learning_rate": 1e-3, "ppo_epochs": 1}
    held = train(tmp_path / "held", inputs, **slow, kl_coef=1e3)[-1]["kl_k3"]
    free = train(tmp_path / "free", inputs, **slow, kl_coef=0.0)[-1]["kl_k3"]
    assert held < 0.05 < 0.2 < free


def test_without_a_reward_it_does_not_move(made: dict[str, Path], tmp_path: Path) -> None:
    found = train(
        tmp_path / "run", {"base": made["base"]}, **LEARNING | {"max_steps": 3}, reward_funcs=("rewards.py:nothing",)
    )
    assert [line["kl"] for line in found] == [0.0] * 3
    assert [line["grad_norm"] for line in found] == [0.0] * 3


def test_the_first_step_is_that_of_the_reference(made: dict[str, Path], tmp_path: Path) -> None:
    first = train(tmp_path / "run", shared(made), max_steps=1)[0]
    assert (first["kl"], first["kl_k3"], first["first_ratio"]) == (0.0, 0.0, 1.0)
    assert first["reward"] == pytest.approx(first["score"])
    wanted = {"score", "score_std", "returns", "advantages", "clip_fraction", "value_clip_fraction", "value_loss"}
    wanted |= {"explained_variance", "entropy", "stop_rate", "answer_tokens", "kl_coef", "policy_loss", "kl_token"}
    assert wanted <= first.keys()


def test_the_artifact_is_the_policy_alone(made: dict[str, Path], tmp_path: Path) -> None:
    train(tmp_path / "run", shared(made))
    output = tmp_path / "run" / "output"
    found = numbers(tmp_path / "run")
    assert found["steps"] == 4
    assert found["shared_base"] is True
    assert found["saved_tensors"] == 28
    assert json.loads((output / "base.json").read_text()) == {"base_digest": "base-0"}
    merged = merge(tmp_path / "merge", made["base"], output)
    assert AutoModelForCausalLM.from_pretrained(merged).config.model_type == "llama"
    samples = read_lines(output / "report" / "samples.jsonl")
    assert [row["step"] for row in samples] == [2] * 4 + [4] * 4
    assert samples[0].keys() == {"step", "prompt", "answer", "score", "tokens"}
    assert samples[0]["prompt"].endswith("<|im_start|>")
    assert (output / "report" / "scores.png").read_bytes().startswith(b"\x89PNG")


CASES: dict[str, dict[str, Any]] = {
    "grpo": {"stage": "grpo", "num_generations": 2, "ppo_epochs": 2},
    "lora": {"ppo_target": 0.5, "ppo_score_norm": True, "ppo_buffer_size": 2, "warmup_ratio": 0.2},
    "full": {"finetuning_type": "full", "reward_funcs": (LOW, "length"), "reward_weights": (1.0, -0.2)},
}


@pytest.mark.parametrize("method", CASES)
def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(
    made: dict[str, Path], tmp_path: Path, method: str
) -> None:
    inputs = {"base": made["base"]} if method == "full" else shared(made)
    fields = CASES[method] | {"max_steps": 9, "lr_scheduler_type": "linear"}
    whole = train(tmp_path / "whole", inputs, **fields)
    (tmp_path / "killed").mkdir()
    chance = random.Random(method)
    for step in sorted(chance.sample(range(1, 8), 3)):
        killed(tmp_path / "killed", step, chance.uniform(0.0, 0.2), train, inputs=inputs, **fields)
    assert train(tmp_path / "killed", inputs, **fields) == whole
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    samples = [read_lines(tmp_path / name / "output" / "report" / "samples.jsonl") for name in ("whole", "killed")]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_pass_that_scoring_keeps_is_to_the_bit_the_one_that_the_first_update_would_make(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    inputs, fields = (
        (shared(made), {}) if stage == "ppo" else ({"base": made["base"]}, CASES["grpo"] | {"reward_funcs": (LOW,)})
    )
    kept = train(tmp_path / "kept", inputs, **fields, max_steps=3)
    taken = []

    def nothing(held: Held) -> None:
        taken.append(held.logps)

    monkeypatch.setattr(Held, "take", nothing)
    again = train(tmp_path / "again", inputs, **fields, max_steps=3)
    assert len(taken) == 3
    assert all(logps.requires_grad for logps in taken)
    assert again == kept
    assert contents(tmp_path / "again") == contents(tmp_path / "kept")


def test_smaller_micro_batches_make_the_same_steps(made: dict[str, Path], tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", shared(made), max_steps=2)
    parts = train(tmp_path / "parts", shared(made), max_steps=2, micro_batch=1)
    for one, other in zip(whole, parts, strict=True):
        for name in ("clip_fraction", "value_clip_fraction"):  # by its last bit, a token is clipped or not
            assert one.pop(name) == pytest.approx(other.pop(name), abs=0.02)
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


def test_a_damaged_checkpoint_is_passed_over(made: dict[str, Path], tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", shared(made), max_steps=6)
    spec = Spec.read(make_spec(tmp_path / "run", shared(made), max_steps=6))
    with pytest.raises(Killed):
        work(spec, DyingEvents(Path(spec.events), 5))
    newest = Path(spec.scratch) / "checkpoints" / "checkpoint-4"
    (newest / "optimizer.critic.safetensors").write_bytes(b"half")
    assert train(tmp_path / "run", shared(made), max_steps=6) == whole
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    events = read_lines(Path(spec.events))
    assert any("optimizer.critic.safetensors does not have" in event.get("text", "") for event in events)
    assert any(event.get("text") == "resumed from step 2" for event in events)


def test_several_rewards_are_weighed_and_each_is_told(made: dict[str, Path], tmp_path: Path) -> None:
    fields = {"reward_funcs": (LOW, "length", "stopped", "exact_match"), "reward_weights": (2.0, 1.0, -1.0, 0.5, 3.0)}
    line = train(tmp_path / "run", shared(made), max_steps=1, **fields)[0]
    names = ["reward_model", LOW, "length", "stopped", "exact_match"]
    parts = [line[f"score/{name}"] for name in names]
    assert line["score"] == pytest.approx(
        sum(w * p for w, p in zip(fields["reward_weights"], parts, strict=True)), abs=1e-5
    )
    assert line["score/length"] == pytest.approx(line["answer_tokens"] / 8)
    assert line["score/stopped"] == line["stop_rate"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too_few", "gave 1 scores for 4 answers"),
        ("broken", "gave the score nan"),
        ("not_there", "has no attribute 'not_there'"),
    ],
)
def test_a_reward_function_that_does_not_work_ends_the_run_with_its_name(
    made: dict[str, Path], tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(ProgramError, match=words) as caught:
        train(tmp_path / "run", {"base": made["base"]}, reward_funcs=(f"rewards.py:{name}",))
    assert caught.value.kind == "bad_setting"
    assert f"rewards.py:{name}" in str(caught.value)


def test_code_of_the_users_may_import_what_it_likes(made: dict[str, Path], tmp_path: Path) -> None:
    own = Spec.read(make_spec(tmp_path / "own", {"base": made["base"]}))
    rules = Spec.read(make_spec(tmp_path / "rules", {"base": made["base"]}, reward_funcs=("length",)))
    assert needed_packages(own) == OPTIONAL
    assert needed_packages(rules) == set()


def test_gradients_recomputed_in_the_backward_pass_make_the_same_steps(made: dict[str, Path], tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", shared(made), max_steps=2)
    path = make_spec(tmp_path / "again", shared(made), max_steps=2)
    values = json.loads(path.read_text())
    values["runtime"]["gradient_checkpointing"] = True
    path.write_text(json.dumps(values))
    spec = Spec.read(path)
    from tasks.program import Events

    work(spec, Events(spec.events))
    assert lines(tmp_path / "again") == plain
    assert contents(tmp_path / "again") == contents(tmp_path / "plain")
