"""Configs and commands of LLaMA-Factory and of the earlier LLamaTuner run here as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from flows.cli.old_commands import read_arguments, read_config
from flows.graph import build
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from registry.recipe import Recipe
from tasks.devices import cuda_devices
from tests.flows.old_configs import GOOD, REFUSED, SFT, make_workplace, write_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    cuda_devices.cache_clear()
    return workplace


def read(folder: Path, name: str, config: dict[str, Any]) -> Recipe:
    raw, _ = read_config([write_config(folder, name, config)])
    return load_recipe(raw)


def test_there_are_configs_of_every_kind() -> None:
    assert (len(GOOD), len(REFUSED)) == (33, 16)


@pytest.mark.parametrize("name", GOOD)
def test_a_config_is_a_recipe(here: Path, name: str) -> None:
    recipe = read(here, name, GOOD[name])
    assert recipe.name == name
    assert (len(recipe.stages), recipe.evaluates is None) in ((1, True), (0, False))


@pytest.mark.parametrize("name", ["lora_sft", "lora_dpo_orpo", "lora_kto", "freeze_sft", "new_tokens", "predict"])
def test_its_steps_can_be_planned(here: Path, home: Path, name: str) -> None:
    assert build(read(here, name, GOOD[name]), Home(home)).steps


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_cannot_be_is_refused_by_exactly_what_is_not_there(here: Path, name: str) -> None:
    config, keys = REFUSED[name]
    with pytest.raises(InputError) as refused:
        read(here, name, config)
    assert {problem.where for problem in refused.value.problems} == keys
    assert "hf_secret" not in str(refused.value)


def test_what_it_says_is_what_is_trained(here: Path) -> None:
    stage = read(here, "lora_sft", GOOD["lora_sft"]).stages[0]
    train, data = stage.train, stage.data
    assert (train.stage, train.finetuning_type, train.lora_rank, train.lora_target) == ("sft", "lora", 8, ("all",))
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_ratio, train.bf16) == (1e-4, "cosine", 0.1, True)
    assert (data.dataset, data.val_size, data.cutoff_len, train.eval_steps) == (("identity", "rows"), 0.1, 256, 500)
    assert [source.name for source in stage.sources] == ["identity", "rows"]
    orpo = read(here, "orpo", GOOD["lora_dpo_orpo"]).stages[0].train
    assert (orpo.stage, orpo.pref_beta) == ("orpo", 0.1)
    earlier = read(here, "earlier", GOOD["earlier_qlora"]).stages[0]
    assert (earlier.train.resolved_quant_bit(), earlier.data.val_size) == (4, 0.1)


def test_a_configs_words_may_be_the_defaults_of_stages(here: Path) -> None:
    config = {k: v for k, v in SFT.items() if k not in ("stage", "dataset", "do_train")}
    stages = {"sft": {"stage": "sft", "dataset": "rows"}, "dpo": {"stage": "dpo", "model": "sft", "dataset": "pairs"}}
    recipe = load_recipe(config | {"name": "two", "dataset_dir": "data", "stages": stages})
    assert [stage.name for stage in recipe.stages] == ["sft", "dpo"]
    assert sum("plot_loss" in note for note in recipe.notes) == 1


@pytest.mark.parametrize("name", GOOD)
def test_an_imported_config_means_the_same(here: Path, name: str, tmp_path: Path, capsys: Capture) -> None:
    path, out = write_config(here, name, GOOD[name]), tmp_path / f"{name}.yaml"
    assert run_app(["import", path, "--out", str(out)]) == 0
    found, meant = load_recipe(str(out)), read(here, name, GOOD[name])
    assert [(s.data, s.train) for s in found.stages] == [(s.data, s.train) for s in meant.stages]
    assert found.evaluation == meant.evaluation
    assert found.notes == ()  # nothing is left to be said
    assert out.read_text().startswith(f"# What {name}.yaml means here.\n")


def test_import_says_what_was_renamed_and_what_has_no_effect(here: Path, capsys: Capture) -> None:
    path = write_config(here, "qlora_8", GOOD["qlora_8"])
    assert run_app(["import", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "quant_bit: 8  # was quantization_bit" in lines
    assert "# overwrite_cache: no effect; what is prepared is kept, and found by its content" in lines


def test_import_writes_over_nothing(here: Path, tmp_path: Path, capsys: Capture) -> None:
    path, out = write_config(here, "qlora_8", GOOD["qlora_8"]), tmp_path / "mine.yaml"
    out.write_text("mine")
    assert run_app(["import", path, "--out", str(out)]) == 2
    assert out.read_text() == "mine"


def test_flags_are_read_as_they_are_typed_there() -> None:
    flags = ["--stage", "sft", "--do_train", "--lora_rank=4", "--freeze_trainable_layers", "-2", "--use_qlora", "True"]
    assert read_arguments(flags) == (
        None,
        ["stage=sft", "do_train=true", "lora_rank=4", "freeze_trainable_layers=-2", "use_qlora=True"],
    )
    assert read_arguments(["a.yaml", "lora_rank=4", "name=x"]) == ("a.yaml", ["lora_rank=4", "name=x"])
    assert read_arguments(["sft_dpo"]) == ("sft_dpo", [])
    with pytest.raises(InputError, match="8: is no --flag, no key=value and no config file"):
        read_arguments(["--lora_rank", "4", "8"])


def test_a_run_of_flags_has_the_name_of_its_output(here: Path) -> None:
    raw, _ = read_config(["--stage", "sft", "--output_dir", "saves/llama3-8b/lora/sft", "--learning_rate", "1e-4"])
    assert isinstance(raw, dict)
    assert (raw["name"], raw["dataset_dir"], raw["learning_rate"]) == ("llama3-8b-lora-sft", "data", 1e-4)


def test_eval_without_a_benchmark_names_the_command(here: Path, capsys: Capture) -> None:
    assert run_app(["eval", "--model_name_or_path", "model"]) == 2
    assert "Use `llamatuner evaluate MODEL --perplexity DATA`" in capsys.readouterr().err


def test_what_somebody_else_put_into_output_dir_is_not_touched(here: Path, home: Path, capsys: Capture) -> None:
    (here / "mine").mkdir(exist_ok=True)
    (here / "mine" / "model.safetensors").write_text("mine")
    path = write_config(here, "mine", SFT | {"output_dir": "mine"})
    assert run_app(["train", path]) == 2
    assert "LLamaTuner has not written it. Name another folder" in capsys.readouterr().err
    assert not (home / "artifacts").exists()
