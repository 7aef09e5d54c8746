"""`llamatuner evaluate`: any model, its base beside it, the numbers of a run, and nothing done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from registry.home import Home
from tests.flows.conftest import Server
from tests.flows.test_evaluation_keys import TASK
from tests.flows.toy import toy_recipe
from tests.flows.twins import work_here
from tests.tiny import read_lines

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A folder with a recipe, its data, a benchmark, and a home in which the recipe is done."""
    root = tmp_path_factory.mktemp("evaluated")
    recipe = toy_recipe(root / "recipe", max_steps=12)
    (root / "recipe" / "colours.yaml").write_text(TASK.format(name="colours"))
    rows = [{"question": f"what colour is thing {n}?", "answer": n % 2} for n in range(6)]
    (root / "recipe" / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMATUNER_HOME", str(root / "home"))
        patch.setenv("PREFECT_API_URL", server.url)
        work_here(patch)
        assert run_app(["run", str(recipe)]) == 0
    return root


@pytest.fixture
def data(made: Path, home: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the recipe; the home is a copy of the test's own."""
    shutil.copytree(made / "home", home, symlinks=True)
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    work_here(monkeypatch)
    return made / "recipe"


def evaluate(capsys: Capture, *arguments: Any, code: int = 0) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert run_app(["evaluate", *map(str, arguments), "--json"]) == code
    out, err = capsys.readouterr()
    answer: dict[str, Any] = json.loads(out)
    return answer, err


def compared(capsys: Capture, *asked: Any, code: int = 0) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert run_app(["compare", *map(str, asked), "--json"]) == code
    out, err = capsys.readouterr()
    answer: dict[str, Any] = json.loads(out)
    return answer, err


def recorded(home: Path) -> dict[str, Any]:
    """The newest run's record."""
    record: dict[str, Any] = json.loads(max((home / "runs").glob("*.json")).read_text())
    return record


def test_a_run_is_measured_like_its_recipe_did_and_nothing_is_measured_twice(
    data: Path, home: Path, capsys: Capture
) -> None:
    before = recorded(home)["results"]
    held_out = data / "held_out.jsonl"
    answer, told = evaluate(capsys, "toy", "--perplexity", held_out, "--set", "cutoff_len=160")
    assert answer["results"]["perplexity.held_out"]["value"] == before["sft"]["perplexity.held_out"]["value"]
    assert answer["base"]["results"]["perplexity.held_out"] == before["base"]["perplexity.held_out"]
    assert "model  perplexity.held_out: " in told
    assert " before, " in told
    again, _ = evaluate(capsys, "toy", "--perplexity", held_out, "--set", "cutoff_len=160")
    assert again["status"] == "up-to-date"
    assert again["results"] == answer["results"]


def test_everything_at_once_has_numbers_with_intervals_and_leaves_its_rows(
    data: Path, home: Path, capsys: Capture
) -> None:
    asked = ["--perplexity", data / "held_out.jsonl", "--benchmarks", data / "colours.yaml"]
    answer, _ = evaluate(capsys, data / "model", *asked, "--generate", data / "held_out.jsonl", "--limit", 4)
    results = answer["results"]
    assert {"perplexity.held_out", "bits_per_byte.held_out", "accuracy.colours", "bleu.held_out"} <= set(results)
    assert results["accuracy.colours"]["rows"] == 4
    assert results["bleu.held_out"]["rows"] == 6
    assert all(found["low"] <= found["value"] <= found["high"] for found in results.values())
    assert "base" not in answer  # it is not known what this folder was made from
    places = {step["step"]: Path(step["artifact"]) for step in answer["steps"]}
    lines = read_lines(places["generate:held_out"] / "answers.jsonl")
    assert [line["reference"] for line in lines] == [f"other {n} {'x' * (n % 7)}" for n in range(6)]
    assert len(read_lines(places["benchmark:colours"] / "samples.jsonl")) == 4
    record = recorded(home)
    assert set(record["measured"]["model"]["steps"]) == {
        *("model/evaluate", "model/generate:held_out", "model/benchmark:colours")
    }


def test_two_models_are_compared_on_the_same_questions(data: Path, home: Path, capsys: Capture) -> None:
    asked = ("--benchmarks", data / "colours.yaml", "--perplexity", data / "held_out.jsonl")
    tuned, _ = evaluate(capsys, "toy", *asked)
    plain, _ = evaluate(capsys, data / "model", *asked)
    assert plain["results"] == tuned["base"]["results"]
    run, model = recorded(home)["id"], data / "model"  # measured already beside the other: no run of its own
    answer, told = compared(capsys, run, model, "toy")
    metrics = {row["metric"]: row for row in answer["metrics"]}
    perplexities = metrics["perplexity.held_out"]
    here, there = (found["results"]["perplexity.held_out"]["value"] for found in (plain, tuned))
    assert perplexities["differences"][1]["value"] == pytest.approx(here - there)
    assert perplexities["differences"][2] == {"value": 0.0, "low": 0.0, "high": 0.0, "real": False}
    colours = metrics["accuracy.colours"]
    assert colours["differences"][1]["low"] <= 0 <= colours["differences"][1]["high"]
    assert colours["results"][2] is None  # the run of the recipe had no benchmark
    assert "accuracy.colours, 6 rows" in told
    assert [side["name"] for side in answer["sides"]] == [run, str(model), "toy"]


def test_a_model_that_nothing_measured_is_not_compared(data: Path, capsys: Capture) -> None:
    answer, _ = compared(capsys, "toy", data / "none", code=2)
    assert "no completed run has that name" in answer["error"]
    evaluate(capsys, data / "model", "--perplexity", data / "held_out.jsonl")
    (data / "other").mkdir(exist_ok=True)
    answer, _ = compared(capsys, "toy", data / "other", code=2)
    assert "not a whole model" in answer["error"]


def test_an_adapter_is_measured_on_the_base_that_it_names(data: Path, home: Path, capsys: Capture) -> None:
    trained = next(Path(s["artifact"]) for s in recorded(home)["steps"] if s["step"] == "train")
    adapter = shutil.copytree(trained, home / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(data / "model")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    asked = ("--perplexity", data / "held_out.jsonl")
    merged, _ = evaluate(capsys, "toy", *asked)
    found, _ = evaluate(capsys, adapter, *asked)
    assert found["results"] == merged["results"]
    assert found["base"] == merged["base"]


def test_a_registered_version_is_the_artifact_of_its_digest(data: Path, home: Path, capsys: Capture) -> None:
    asked = ("--perplexity", data / "held_out.jsonl", "--compare-with", "none")
    by_run, _ = evaluate(capsys, "toy:sft", *asked)
    by_version, _ = evaluate(capsys, "models:/toy-sft/1", *asked)
    assert by_version["results"] == by_run["results"]
    assert "base" not in by_version
    answer, _ = evaluate(capsys, "models:/toy-sft@champion", *asked, code=2)
    assert "champion" in answer["error"]
    for artifact in Home.open().artifacts.glob("merge/*"):
        shutil.rmtree(artifact)
    answer, _ = evaluate(capsys, "models:/toy-sft/1", *asked, code=2)
    assert "no artifact of this home has it" in answer["error"]


def test_a_model_is_measured_in_fewer_bits_than_it_has(data: Path, capsys: Capture) -> None:
    asked = (data / "model", "--perplexity", data / "held_out.jsonl")
    whole, _ = evaluate(capsys, *asked)
    eight, _ = evaluate(capsys, *asked, "--set", "quant_bit=8")
    values = [answer["results"]["perplexity.held_out"]["value"] for answer in (whole, eight)]
    assert values[0] != values[1] == pytest.approx(values[0], rel=0.05)
    again, _ = evaluate(capsys, *asked, "--set", "quant_type=nf4", "--set", "quant_bit=8")
    assert again["status"] == "up-to-date"  # of 8 bits there is one kind
