"""Win rates and preferences of a recipe: its steps, a run, and the same numbers from `llamatuner evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from flows.graph import Pipeline, build
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from tasks.steps import Step
from tests.flows.conftest import Server
from tests.flows.test_chains import chain, write_pairs
from tests.flows.toy import toy_recipe
from tests.flows.twins import work_here
from tests.tiny import read_lines

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its data."""
    folder = tmp_path_factory.mktemp("won") / "recipe"
    toy_recipe(folder)
    write_pairs(folder / "pairs.jsonl", 12, "pair")
    write_pairs(folder / "held_out_pairs.jsonl", 5, "other")
    return folder


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """sft, a reward model, and dpo; answers to a data set are scored by the reward model."""
    pairs = {"model": "sft", "dataset": str(folder / "pairs.jsonl")}
    held_out = {"eval_dataset": str(folder / "held_out_pairs.jsonl")}
    return {
        "name": "won",
        "model_name_or_path": str(folder / "model"),
        "finetuning_type": "full",
        "cutoff_len": 160,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "stages": {
            "sft": {"stage": "sft", "dataset": str(folder / "train.jsonl")},
            "dpo": {"stage": "dpo", **pairs, **held_out} | changes.pop("dpo", {}),
            "rm": {"stage": "rm", **pairs},
        },
        "evaluation": {"generate": [str(folder / "held_out.jsonl")], "max_new_tokens": 6, "reward_model": "rm"}
        | changes,
    }


def built(raw: dict[str, Any]) -> Pipeline:
    return build(load_recipe(raw), Home.open())


def steps_of(pipeline: Pipeline, label: str) -> dict[str, Step]:
    return {step.name: step for step in pipeline.measured[label].steps}


def test_a_stage_is_compared_with_what_it_started_from_by_a_stage_of_the_recipe(folder: Path) -> None:
    pipeline = built(recipe(folder))
    own, before = steps_of(pipeline, "dpo"), steps_of(pipeline, "sft:dpo")
    won = own["win_rate:held_out"]
    assert won.inputs["base_answers"].source is before["generate:held_out:dpo"]
    assert won.inputs["reward_model"].source is pipeline.stages["rm"].model
    assert "base_answers" not in before["win_rate:held_out:dpo"].inputs
    assert (
        steps_of(pipeline, "sft")["win_rate:held_out"].inputs["base_answers"].source
        is (steps_of(pipeline, "base")["generate:held_out"])
    )
    alone = built(recipe(folder, compare_with="none"))
    assert "base_answers" not in steps_of(alone, "dpo")["win_rate:held_out"].inputs
    without = built(recipe(folder, reward_model=None))
    assert not [step.title for step in without.steps if step.kind == "win_rate"]
    assert not [step.title for step in pipeline.data_only().steps if step.kind in ("win_rate", "train")]


def test_a_gate_on_a_win_rate_is_known(folder: Path) -> None:
    gate = ["win_rate_base.held_out > 0.5", "implicit_reward_accuracy.held_out_pairs > 0", "reward_score.held_out > 0"]
    built(recipe(folder, gate=gate))
    with pytest.raises(InputError, match="win_rate_bass"):
        built(recipe(folder, gate=["win_rate_bass.held_out > 0.5"]))
    with pytest.raises(InputError, match="has no win_rate_base"):
        built(recipe(folder, gate=gate, compare_with="none"))


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("sft", r"evaluation\.reward_model: stage sft is of kind sft, and makes no reward model"),
        ("rn", r"evaluation\.reward_model: 'rn' is not a known model.* Stages of kind rm: rm\."),
        ("won:rm", r"evaluation\.reward_model"),
    ],
)
def test_what_is_no_reward_model_is_refused(folder: Path, named: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        built(recipe(folder, reward_model=named))


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({}, True),
        ({"dpo": {"ref_model": "sft"}}, True),  # the model that it starts from
        ({"dpo": {"ref_model": "FOLDER/model"}}, False),
        ({"dpo": {"pref_loss": "simpo"}}, False),
        ({"dpo": {"stage": "orpo"}}, False),
        ({"dpo": {"eval_dataset": None, "dataset": "FOLDER/pairs.jsonl"}}, False),
        ({"compare_with": "none"}, False),
    ],
)
def test_implicit_rewards_are_measured_where_the_reference_was(
    folder: Path, changes: dict[str, Any], there: bool
) -> None:
    placed = json.loads(json.dumps(changes).replace("FOLDER", str(folder)))
    raw = recipe(folder, perplexity=[str(folder / "held_out.jsonl")], **placed)
    raw["stages"]["dpo"] = {name: value for name, value in raw["stages"]["dpo"].items() if value is not None}
    names = steps_of(built(raw), "dpo")
    assert ("implicit_reward" in names) == there
    if there:
        step = names["implicit_reward"]
        assert (step.identity, step.runtime["set_names"]) == ({"sets": [0]}, ["held_out_pairs"])
    pairs = "pairs" in names["evaluate"].identity
    assert pairs == ("eval_dataset" in raw["stages"]["dpo"])
    assert "implicit_reward" not in steps_of(built(raw), "sft")


def test_pairs_alone_have_a_key_of_their_own(folder: Path, tmp_path: Path) -> None:
    pipeline = build(load_recipe(str(chain(tmp_path / "chain"))), Home.open())
    (sft,) = (step for step in pipeline.measured["sft"].steps if step.kind == "evaluate")
    assert "pairs" not in sft.identity
    assert sft.runtime["metrics"] == ("perplexity", "bits_per_byte")


def ask(capsys: Capture, *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    code = run_app([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.mark.slow
def test_a_run_and_an_evaluation_give_the_same_win_rates(
    folder: Path, home: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    work_here(monkeypatch)
    path = tmp_path / "won.json"
    path.write_text(json.dumps(recipe(folder)))
    answer = ask(capsys, "run", path)
    results = answer["results"]
    dpo = results["dpo"]
    assert {"reward_score.held_out", "win_rate_reference.held_out", "win_rate_base.held_out"} <= {*dpo}
    assert {"reward_score.held_out", "win_rate_reference.held_out"} <= {*results["sft:dpo"]}
    places = {f"{step['stage']}/{step['step']}": Path(step["artifact"]) for step in answer["steps"]}
    lines = read_lines(places["dpo/win_rate:held_out"] / "rewards.jsonl")
    wins = [(line["answer"] > line["base"]) + (line["answer"] == line["base"]) / 2 for line in lines]
    assert len(lines) == dpo["win_rate_base.held_out"]["rows"] == 6
    assert dpo["win_rate_base.held_out"]["value"] == pytest.approx(sum(wins) / 6)
    measured = (places[step] / "nll.0.jsonl" for step in ("dpo/evaluate", "sft/evaluate:dpo"))
    after, before = ([line["nll"] for line in read_lines(path)] for path in measured)
    moved = [old - new for new, old in zip(after, before, strict=True)]
    right = sum(chosen > rejected for chosen, rejected in zip(moved[::2], moved[1::2], strict=True))
    assert dpo["implicit_reward_accuracy.held_out_pairs"].items() >= {"right": right, "rows": 5}.items()
    assert {"preference_accuracy.held_out_pairs", "preference_accuracy_norm.held_out_pairs"} <= {*dpo}
    assert "implicit_reward_accuracy.held_out_pairs" not in results["sft:dpo"]

    asked = ["--generate", folder / "held_out.jsonl", "--reward", "won:rm", "--set", "evaluation.max_new_tokens=6"]
    found = ask(capsys, "evaluate", "won:sft", *asked, "--set", "cutoff_len=160")
    for name in ("reward_score.held_out", "win_rate_reference.held_out", "win_rate_base.held_out"):
        assert found["results"][name] == results["sft"][name]
    assert found["base"]["results"]["reward_score.held_out"] == results["base"]["reward_score.held_out"]
    states = {step["step"]: step["state"] for step in found["steps"]}
    assert states["win_rate:held_out"] == "cached"
    found = ask(
        capsys, "evaluate", "won:dpo", "--perplexity", folder / "held_out_pairs.jsonl", "--set", "cutoff_len=160"
    )
    for name in ("perplexity", "preference_accuracy", "preference_accuracy_norm"):
        assert found["results"][f"{name}.held_out_pairs"] == dpo[f"{name}.held_out_pairs"]
    compared = ask(capsys, "compare", "won:sft", "won:dpo")
    metrics = {row["metric"]: row for row in compared["metrics"]}
    assert metrics["reward_score.held_out"]["differences"][1] is not None
    assert None not in metrics["win_rate_reference.held_out"]["results"]
