"""Finished runs side by side: what differs, which numbers differ by more than chance, and the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest

from flows.cli.app import run_app
from flows.comparison_page import FIRST_LINE
from registry.home import Home
from tasks.tracking import mlflow_client
from tests.flows.conftest import Server
from tests.flows.toy import toy_recipe
from tests.flows.twins import work_here
from tests.tiny import read_lines

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
OTHER = "stages.sft.learning_rate=0.05"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A folder with a home of three runs: as the recipe says, with another learning rate, and as it says again."""
    root = tmp_path_factory.mktemp("compared")
    recipe = toy_recipe(root / "recipe", max_steps=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMATUNER_HOME", str(root / "home"))
        patch.setenv("PREFECT_API_URL", server.url)
        work_here(patch)
        assert run_app(["run", str(recipe)]) == 0
        assert run_app(["run", str(recipe), "--set", OTHER]) == 0
        # as it was, under another name, with one more question
        raw = json.loads(recipe.read_text()) | {"name": "again"}
        raw["evaluation"]["questions"].append("say row 4")
        (recipe.parent / "again.json").write_text(json.dumps(raw))
        assert run_app(["run", str(recipe.parent / "again.json")]) == 0
    return root


@pytest.fixture
def runs(made: Path, home: Path) -> list[str]:
    """The ids of the runs, the first one first, in a home of the test's own."""
    shutil.copytree(made / "home", home, symlinks=True)
    return [path.stem for path in sorted((home / "runs").glob("*.json"))]


def ask(capsys: Capture, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert run_app(["compare", *arguments, "--json"]) == code
    out, err = capsys.readouterr()
    answer: dict[str, Any] = json.loads(out)
    return answer, err


def perplexities(home: Path, key: str) -> numpy.ndarray:
    """NLL and tokens of every held-out row, [2, rows]."""
    (folder,) = (home / "artifacts" / "evaluate").glob(f"*-{key[:12]}")
    lines = read_lines(folder / "nll.0.jsonl")
    return numpy.array([[line[name] for line in lines] for name in ("nll", "tokens")])


def test_the_settings_that_differ_are_named_and_no_others(runs: list[str], capsys: Capture) -> None:
    answer, told = ask(capsys, runs[0], runs[1])
    assert answer["settings"] == [{"setting": "train: train.learning_rate", "values": [0.01, 0.05]}]
    assert answer["sides"] == [{"name": run, "run": run, "stage": "sft"} for run in runs[:2]]
    assert "train: train.learning_rate  0.01  0.05" in told
    assert all(len(line) <= 80 for line in told.splitlines())
    before, _ = ask(capsys, "toy~1", "toy")
    assert [side["run"] for side in before["sides"]] == runs[:2]


def test_a_difference_is_that_of_paired_rows(runs: list[str], home: Path, capsys: Capture) -> None:
    answer, told = ask(capsys, runs[0], runs[1])
    row, bits = answer["metrics"]
    assert (row["metric"], row["rows"]) == ("perplexity.held_out", 6)
    assert bits["metric"] == "bits_per_byte.held_out"
    records = [json.loads((home / "runs" / f"{run}.json").read_text()) for run in runs[:2]]
    assert row["results"] == [record["results"]["sft"]["perplexity.held_out"] for record in records]
    keys = [
        next(s["key"] for s in record["steps"] if (s["stage"], s["step"]) == ("sft", "evaluate")) for record in records
    ]
    one, other = (perplexities(home, key) for key in keys)
    random, drawn = numpy.random.default_rng(1), []
    for _ in range(4000):  # a plain loop over draws of its own
        chosen = random.integers(0, 6, 6)
        first, second = (numpy.exp(part[0, chosen].sum() / part[1, chosen].sum()) for part in (one, other))
        drawn.append(second - first)
    found = row["differences"][1]
    low, high = numpy.percentile(drawn, [2.5, 97.5])
    width = high - low
    assert found["low"] == pytest.approx(low, abs=0.1 * width)
    assert found["high"] == pytest.approx(high, abs=0.1 * width)
    assert found["value"] == pytest.approx(row["results"][1]["value"] - row["results"][0]["value"])
    assert found["real"] == (not low <= 0 <= high)
    assert ("differs" in told, "may be chance" in told) == (found["real"], not found["real"])


def test_a_comparison_is_kept_in_mlflow(runs: list[str], home: Path, capsys: Capture) -> None:
    answer, told = ask(capsys, runs[0], runs[1], "--record")
    client = mlflow_client(Home(home))
    run = client.get_run(answer["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["llamatuner.compared"] == ",".join(runs[:2])
    row = answer["metrics"][0]
    assert run.data.metrics["perplexity.held_out/B"] == row["results"][1]["value"]
    assert run.data.metrics["perplexity.held_out/B-A.low"] == row["differences"][1]["low"]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"comparison.html", "comparison.json"} <= files
    assert f"kept in MLflow: comparison.html of run {run.info.run_id}" in " ".join(told.split())


def test_equal_models_do_not_differ_and_only_what_was_asked_of_both_is_shown_for_both(
    runs: list[str], capsys: Capture
) -> None:
    answer, _ = ask(capsys, runs[0], "again")
    assert [row["setting"] for row in answer["settings"]] == ["evaluate: questions"]
    row, _ = answer["metrics"]
    assert row["differences"] == [None, {"value": 0.0, "low": 0.0, "high": 0.0, "real": False}]
    questions = {each["question"]: each["answers"] for each in answer["answers"]}
    assert questions["say row 3"][0] == questions["say row 3"][1]
    assert questions["say row 4"][0] is None


def test_the_page_is_one_file_with_its_pictures(runs: list[str], tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "page.html"
    answer, _ = ask(capsys, *runs, "--html", str(page))
    text = page.read_text()
    assert text.startswith(FIRST_LINE)
    assert text.count('src="data:image/png;base64,') == 2
    assert "<script" not in text
    assert "http:" not in text.replace("http-equiv", "")
    assert all(run in text for run in runs)
    assert answer["html"] == str(page)
    ask(capsys, *runs, "--html", str(page))  # an earlier page is written over
    page.write_text("mine")
    answer, _ = ask(capsys, *runs, "--html", str(page), code=2)
    assert "is there and is no such page" in answer["error"]
    assert page.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy"], "1 to compare. Name two to 7 runs"),
        (["toy", "toi"], "no completed run has that name. Did you mean toy?"),
        (["toy", "20"], "completed runs begin with '20'"),
        (["toy", "toy~9"], "toy~9: toy has"),
        (["toy", "toy:dpo"], "stage 'dpo' was not measured. Measured: sft."),
    ],
)
def test_what_cannot_be_compared_is_refused(runs: list[str], capsys: Capture, arguments: list[str], words: str) -> None:
    answer, _ = ask(capsys, *arguments, code=2)
    assert words in answer["error"]


def test_a_run_whose_artifacts_are_gone_is_refused(runs: list[str], home: Path, capsys: Capture) -> None:
    for folder in (home / "artifacts" / "train").glob("toy-sft-*"):
        shutil.rmtree(folder)
    answer, _ = ask(capsys, runs[0], runs[1], code=2)
    assert "what sft/train made is gone or damaged. Run the recipe again." in answer["error"]
