"""`init` writes a recipe that can be run, for whatever rows there are, and nothing that cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import new_recipe
from flows.cli.app import run_app
from flows.new_recipe import Wish, write_recipe
from registry.errors import InputError
from registry.loading import load_recipe
from registry.models import MODELS
from tasks.devices import Device
from tests.tiny import tiny_model

Capture = pytest.CaptureFixture[str]
SHIPPED = Path(__file__).parents[2] / "registry" / "data"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the test stands, of a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_recipe, "cuda_devices", lambda: ())
    return tmp_path


@pytest.mark.parametrize(
    ("data", "goal"),
    [("assistant", "sft"), ("assistant_chat", "sft"), ("assistant_preferences", "dpo"), ("assistant_text", "pt")],
)
def test_the_goal_is_what_the_rows_are_for(here: Path, data: str, goal: str, capsys: Capture) -> None:
    assert (
        run_app(["init", "--model", "smollm2-135m-instruct", "--data", str(SHIPPED / f"{data}.jsonl"), "--json"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert (answer["recipe"], answer["goal"]) == (f"{data}-{goal}.yaml", goal)
    (stage,) = load_recipe(answer["recipe"], []).stages
    assert (stage.train.stage, stage.train.finetuning_type, stage.data.val_size) == (goal, "lora", 0.05)
    rows = len((SHIPPED / f"{data}.jsonl").read_text().splitlines())
    assert stage.train.per_device_train_batch_size * stage.train.gradient_accumulation_steps == rows // 20
    assert all(len(line) <= 120 for line in Path(answer["recipe"]).read_text().splitlines())


@pytest.mark.parametrize(
    ("rows", "kept_back", "a_step", "epochs", "packing"),
    [(2, 1, 1, 10, False), (19, 1, 1, 10, False), (60, 0.05, 3, 3, False), (320, 0.05, 16, 3, True)],
)
def test_few_rows_make_a_recipe_that_trains_on_them(
    here: Path, rows: int, kept_back: float, a_step: int, epochs: int, packing: bool
) -> None:
    tiny_model(here / "model")
    lines = [json.dumps({"instruction": f"say {n}", "output": f"{n}"}) + "\n" for n in range(rows)]
    (here / "few.jsonl").write_text("".join(lines))
    assert run_app(["init", "few.yaml", "--model", "model", "--data", "few.jsonl"]) == 0
    (stage,) = load_recipe("few.yaml", []).stages
    train = stage.train
    assert (stage.data.val_size, train.num_train_epochs, stage.data.packing) == (kept_back, epochs, packing)
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == a_step
    assert load_recipe("few.yaml", []).evaluation.questions == ("say 0",)
    assert run_app(["check", "few.yaml"]) == 0


@pytest.mark.parametrize("question", ["no", "~", "What: is it? # 你", 'say "x"', "- a"])
def test_what_is_asked_is_what_stands_in_the_rows(here: Path, question: str) -> None:
    tiny_model(here / "model")
    rows = [{"instruction": text, "output": "x"} for text in ("a" * 200, "two\nlines", question)]
    (here / "no.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_app(["init", "few.yaml", "--model", "model", "--data", "no.jsonl"]) == 0
    assert load_recipe("few.yaml", []).evaluation.questions == (question,)


def test_a_single_row_is_refused(here: Path, capsys: Capture) -> None:
    (here / "one.jsonl").write_text('{"instruction": "say 1", "output": "1"}\n')
    assert run_app(["init", "--model", "smollm2-135m-instruct", "--data", "one.jsonl"]) == 2
    assert "has 1 usable row; one is kept back to measure on" in " ".join(capsys.readouterr().err.split())
    assert not list(here.glob("*.yaml"))


def test_a_recipe_is_for_the_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = Wish("qwen3-8b", "rows.jsonl", "sft")

    def on(memory: int, capability: tuple[int, int] = (8, 0), count: int = 1) -> str:
        device = Device("GPU-1", "GPU", capability, memory << 10)
        monkeypatch.setattr(new_recipe, "cuda_devices", lambda: (device,) * count)
        return write_recipe(wish, Path("mine.yaml"))

    assert "quant_bit" not in on(80)
    assert "bf16: true" in on(80)
    assert "gradient_accumulation_steps: 4" in on(80)
    assert "gradient_accumulation_steps: 1" in on(80, count=4)
    assert "quant_bit: 4" in on(16)
    assert "bf16" not in on(16, (7, 5))
    with pytest.raises(InputError, match=r"8\.\d billion weights are too many for 6 GiB.* A smaller one: "):
        on(6)


def test_a_folder_of_weights_and_a_name_with_odd_characters_are_read_back(here: Path) -> None:
    tiny_model(here / "my model: tiny")
    text = write_recipe(Wish("my model: tiny", "owner/rows:set@train[:10%]", "sft"), Path("mine.yaml"))
    Path("mine.yaml").write_text(text)
    recipe = load_recipe("mine.yaml", [])
    assert Path(recipe.raw["model_name_or_path"]) == here / "my model: tiny"
    assert recipe.raw["stages"]["sft"]["dataset"] == ["owner/rows:set@train[:10%]"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model: is missing, and there is no terminal to ask on"),
        (["--model", "smollm2-135m-instruct"], "--data: is missing"),
        (["--model", "smollm2-135m-instruc", "--data", "assistant"], "Did you mean smollm2-135m-instruct"),
        (["--model", "smollm2-135m-instruct", "--data", "assistent"], "Did you mean assistant"),
        (
            ["--model", "smollm2-135m-instruct", "--data", "assistant", "--goal", "sfd"],
            "no such goal. Did you mean sft",
        ),
        (["--model", "smollm2-135m-instruct", "--data", "assistant_prompts"], "its rows are questions without answers"),
        (["there.yaml", "--model", "smollm2-135m-instruct", "--data", "assistant"], "nothing is written over"),
        (["--model", "empty", "--data", "assistant"], "a folder without config.json"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_and_nothing_is_written(
    here: Path, arguments: list[str], words: str, capsys: Capture
) -> None:
    Path("there.yaml").write_text("mine")
    Path("empty").mkdir()
    assert run_app(["init", *arguments]) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
    assert sorted(path.name for path in here.iterdir() if path.name != "home") == ["empty", "there.yaml"]
    assert Path("there.yaml").read_text() == "mine"


def answered(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """A person on a terminal."""
    left: list[Any] = list(answers)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda question, default=None: left.pop(0) or default)


def test_a_person_is_asked_what_is_missing(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    answered(monkeypatch, "", "assistant_preferences", "")
    assert run_app(["init"]) == 0
    assert "Next:" in capsys.readouterr().out
    recipe = load_recipe("assistant_preferences-dpo.yaml", [])
    assert recipe.raw["model_name_or_path"] == next(iter(MODELS))
    assert recipe.stages[0].train.stage == "dpo"
