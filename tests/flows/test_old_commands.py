"""Commands of LLaMA-Factory run whole: training, what starts from its output, and a second time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from tasks.devices import cuda_devices
from tests.flows.conftest import Server
from tests.flows.old_configs import DATA, DPO, FULL, GOOD, MODEL, SFT, make_workplace, write_config
from tests.flows.toy import states
from tests.flows.twins import work_here

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
SHORT = {"max_steps": 2, "max_samples": 8, "gradient_accumulation_steps": 1, "bf16": False, "lora_rank": 2}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def here(shared: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory and home that all of these share; programs do their work in this process."""
    monkeypatch.setenv("LLAMATUNER_HOME", str(shared / "home"))
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    monkeypatch.chdir(shared)
    work_here(monkeypatch)
    cuda_devices.cache_clear()
    yield shared
    assert "MLFLOW_TRACKING_URI" not in os.environ


def train(capsys: Capture, *arguments: str) -> tuple[dict[str, Any], str]:
    """The one JSON line of `train`, and what it told people."""
    capsys.readouterr()
    code = run_app(["train", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer, err


def test_a_config_is_trained_into_its_output_and_the_next_one_starts_there(here: Path, capsys: Capture) -> None:
    sft = write_config(here, "sft", SFT | SHORT | {"output_dir": "saves/sft"})
    first, said = train(capsys, sft)
    assert first["status"] == "completed"
    assert "plot_loss: no effect" in " ".join(said.split())
    adapter = here / "saves" / "sft"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    before = (adapter / "adapter_model.safetensors").read_bytes()
    again, said = train(capsys, sft)
    assert (again["status"], set(states(again).values())) == ("up-to-date", {"cached"})
    assert f"{adapter}: the model is there already" in " ".join(said.split())
    predict = MODEL | DATA | {"stage": "sft", "do_predict": True, "predict_with_generate": True, "max_samples": 2}
    predict |= {"adapter_name_or_path": "saves/sft", "eval_dataset": "rows", "max_new_tokens": 3}
    answer, _ = train(capsys, write_config(here, "predict", predict))
    assert answer["status"] == "completed"
    assert answer["results"]["model"]["bleu.rows"]["rows"] == 2
    merge = MODEL | {"adapter_name_or_path": "saves/sft", "template": "qwen", "finetuning_type": "lora"}
    merge |= {"export_dir": "merged", "export_size": 2, "export_device": "cpu", "export_legacy_format": False}
    for _ in "ab":  # a second time there is nothing to do
        assert run_app(["export", write_config(here, "merge", merge), "--json"]) == 0
        merged = json.loads(capsys.readouterr().out)
        assert (merged["folder"], (here / "merged" / "model.safetensors").is_file()) == (str(here / "merged"), True)
    # the merge that the run itself made
    assert merged["digest"] == next(step["digest"] for step in first["steps"] if step["step"] == "merge")
    other, said = train(capsys, sft, "learning_rate=0.01")
    assert (other["status"], "is " + str(here / "saves" / "sft.replaced-1") in " ".join(said.split())) == (
        "completed",
        True,
    )
    assert (here / "saves" / "sft.replaced-1" / "adapter_model.safetensors").read_bytes() == before
    assert (adapter / "adapter_model.safetensors").read_bytes() != before


def test_flags_train_as_a_file_does(here: Path, capsys: Capture) -> None:
    config = {**SFT, **SHORT, "output_dir": "saves/flags", "trust_remote_code": True}
    words = [word for key, value in config.items() if value is not None for word in (f"--{key}", str(value))]
    first, _ = train(capsys, *words)
    second, _ = train(capsys, write_config(here, "file", config))
    assert set(states(second).values()) == {"cached"}
    assert {step["key"] for step in first["steps"]} == {step["key"] for step in second["steps"]}


def test_a_reward_model_in_output_dir_judges_ppo(here: Path, capsys: Capture) -> None:
    reward = DPO | SHORT | {"stage": "rm", "output_dir": "saves/reward"}
    reward = {key: value for key, value in reward.items() if key not in ("pref_beta", "pref_loss")}
    train(capsys, write_config(here, "reward", reward))
    ppo = GOOD["lora_ppo"] | SHORT | {"reward_model": "saves/reward", "output_dir": "saves/ppo", "max_new_tokens": 3}
    answer, _ = train(capsys, write_config(here, "ppo", ppo))
    assert answer["results"]["ppo"]["train.steps"] == {"value": 2}


def test_orpo_is_a_loss_there_and_a_stage_here(here: Path, capsys: Capture) -> None:
    train(capsys, write_config(here, "orpo", GOOD["lora_dpo_orpo"] | SHORT | {"output_dir": "saves/orpo"}))
    assert (here / "saves" / "orpo" / "adapter_model.safetensors").is_file()


def test_a_full_training_leaves_a_model(here: Path, capsys: Capture) -> None:
    short = {key: value for key, value in SHORT.items() if key != "lora_rank"}
    train(capsys, write_config(here, "full", FULL | short | {"output_dir": "saves/full"}))
    assert (here / "saves" / "full" / "model.safetensors").is_file()
