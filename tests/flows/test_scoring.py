"""A reward model's numbers are seen where people look, and `llamatuner score` gives its scores of any file.

One decision: one small run is made for the whole file; its reward model is of random weights that moved two steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from transformers import AutoTokenizer

from flows.cli.app import run_app
from registry.home import Home
from tasks.artifacts import Store
from tasks.evaluation import VERSIONS
from tests.flows.conftest import Server
from tests.flows.processes import prefect_pages
from tests.flows.test_chains import write_pairs
from tests.flows.toy import PROJECT, run, toy_recipe
from tests.tiny import read_lines

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
LENGTHS = ("chosen_shorter", "similar_length", "chosen_longer")
START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A folder with a recipe (a reward model named judge, and sft beside it, not run) and the home it is done in."""
    folder = tmp_path_factory.mktemp("judge")
    toy_recipe(folder)
    write_pairs(folder / "pairs.jsonl", 12, "pair")
    stage = {"stage": "rm", "dataset": "pairs.jsonl", "val_size": 4, "default_system": "Be brief."}
    stage |= {"finetuning_type": "full", "max_steps": 2, "learning_rate": 1e-3, "cutoff_len": 160}
    raw = {"name": "one", "model_name_or_path": "model", "stages": {"judge": stage}}
    (folder / "one.json").write_text(json.dumps(raw))
    raw["stages"] = {"judge": stage, "sft": {"stage": "sft", "dataset": "train.jsonl"}}
    (folder / "two.json").write_text(json.dumps(raw))
    del raw["stages"]["judge"]
    (folder / "none.json").write_text(json.dumps(raw))
    recipe = str(folder / "one.json")
    answer = run("run", recipe, LLAMATUNER_HOME=str(folder / "home"), PREFECT_API_URL=server.url)
    (folder / "answer.json").write_text(json.dumps(answer))
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, in which the test stands."""
    monkeypatch.setenv("LLAMATUNER_HOME", str(made / "home"))
    monkeypatch.chdir(made)
    return made


def score(capsys: Capture, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The one JSON line of `score`."""
    capsys.readouterr()
    assert run_app(["score", *arguments, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    answer: dict[str, Any] = json.loads(out)
    return answer


def judge(folder: Path) -> Path:
    """The reward model's artifact."""
    (found,) = (a for a in Store(Home(folder / "home")).all() if a.step == "train")
    return found.path


def by_hand(model: Path, *turns: tuple[str, str]) -> float:
    """The score of a conversation that ends with an answer, rendered and read without the project's data steps."""
    from tasks.train.reward import answer_scores, load_scoring

    text = "\n".join(f"{START}{role}\n{content}{END}" for role, content in turns)
    ids = torch.tensor([AutoTokenizer.from_pretrained(model).encode(text, add_special_tokens=False)])
    with torch.no_grad():
        inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        return float(answer_scores(load_scoring(str(model), torch.float32).eval(), inputs)[0])


def test_results_by_length_and_the_picture_are_in_the_answer_in_prefect_and_in_mlflow(
    folder: Path, server: Server
) -> None:
    answer = json.loads((folder / "answer.json").read_text())
    results = answer["results"]["judge"]
    assert {"reward_accuracy.validation", "reward_margin.validation", "longer_is_better_accuracy.validation"} < set(
        results
    )
    assert any(f"reward_accuracy_{name}.validation" in results for name in LENGTHS)
    assert 0 <= results["reward_calibration_error.validation"]["value"] <= 1
    assert "judge-evaluate-rewards-0" in prefect_pages(server.database)
    client = MlflowClient(f"sqlite:///{folder / 'home' / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_run(answer["mlflow_run_id"]).info.experiment_id
    (evaluation,) = (r for r in client.search_runs([experiment]) if r.info.run_name == "judge evaluation")
    for ending, name in (("", "value"), (".low", "low"), (".high", "high")):
        found = evaluation.data.metrics[f"reward_accuracy.validation{ending}"]
        assert found == results["reward_accuracy.validation"][name]
    (picture,) = client.list_artifacts(evaluation.info.run_id, "rewards")
    (evaluated,) = (
        a for a in Store(Home(folder / "home")).all() if a.manifest["stage"] == "judge" and "evalu" in a.step
    )
    assert picture.path == "rewards/0-validation.png"
    assert picture.file_size == evaluated.files["report/rewards.0.png"][0]
    assert evaluated.manifest["step_version"] == VERSIONS["reward"]


def test_the_report_of_a_run_shows_accuracy_by_length(folder: Path, capsys: Capture) -> None:
    assert run_app(["run", "one.json"]) == 0
    out = capsys.readouterr().out
    for words in ("judge  validation", "preferred answer is shorter", "the rule “the longer is better”", "calibration"):
        assert words in out
    assert "reward_accuracy" not in out


def test_pairs_are_scored_as_by_hand_and_what_cannot_be_is_named(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [
        {"instruction": "a", "chosen": "yes", "rejected": "no no"},
        {"instruction": "b", "chosen": "same", "rejected": "same"},
        {"instruction": "c", "chosen": "x" * 600, "rejected": "y"},
        {"instruction": "d", "chosen": "z" * 200, "rejected": "y"},  # longer than the stage's cutoff_len: 160
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("one.json", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "scores.jsonl"))
    answer = score(capsys, *arguments)
    model = judge(folder)
    lines = read_lines(tmp_path / "scores.jsonl")
    assert [line["row"] for line in lines] == [0, 3]
    for line in lines:
        row = rows[line["row"]]
        for part in ("chosen", "rejected"):
            turns = (("system", "Be brief."), ("user", row["instruction"]), ("assistant", row[part]))
            assert line[part] == pytest.approx(by_hand(model, *turns), abs=1e-5)
        assert line["margin"] == line["chosen"] - line["rejected"]
    found = [(row["row"], row["place"], row["reason"]) for row in answer["left_out"]]
    assert found == [(1, "line 2", "tie"), (2, "line 3", "too_long")]
    assert (answer["model"], answer["folder"], answer["rows"]) == ("one-judge", str(model), 2)
    results = answer["results"]
    assert results["reward_accuracy"]["right"] == sum(line["margin"] > 0 for line in lines)
    assert results["reward_score"]["highest"] == max(max(line["chosen"], line["rejected"]) for line in lines)
    assert "scores" not in answer  # they are in the file
    again = score(capsys, *arguments, code=2)
    assert again["error"].endswith("scores.jsonl: is there already. Remove it, or name another file.")
    # what was scored is there: nothing is launched, torch is not loaded
    code = "import sys; from flows.cli.app import run_app; print(run_app(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "score", str(folder / "one.json"), arguments[1]]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "0 False"
    assert "score/evaluate                     cached" in ended.stdout
    assert "left out 2 of 4 rows: 1 tie, 1 too_long" in ended.stdout


def test_a_folder_scores_the_last_answers_of_conversations(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    model = judge(folder)
    for name, count in (("one", 2), ("two", 1)):  # two files: which one a row is of is told
        turns = [{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": "first"}]
        turns += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "last"}]
        lines = "".join(json.dumps({"messages": turns[: 4 - 2 * n]}) + "\n" for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    answer = score(capsys, str(model), str(tmp_path / "*.jsonl"))
    assert [(Path(line["file"]).name, line["row"]) for line in answer["scores"]] == [
        ("one.jsonl", 0),
        ("one.jsonl", 1),
        ("two.jsonl", 0),
    ]
    short = (("user", "one?"), ("assistant", "first"))  # a folder says nothing of default_system
    wanted = by_hand(model, *short, ("user", "and?"), ("assistant", "last")), by_hand(model, *short)
    assert [line["score"] for line in answer["scores"][:2]] == pytest.approx(wanted, abs=1e-5)
    scores = [line["score"] for line in answer["scores"]]
    assert answer["results"] == {
        "reward_score": {
            "value": pytest.approx(sum(scores) / 3),
            "low": pytest.approx(min(scores)),
            "high": pytest.approx(max(scores)),
            "lowest": min(scores),
            "highest": max(scores),
            "rows": 3,
        }
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("one.json", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("./nowhere", "pairs.jsonl"), "./nowhere: there is no such folder and no such recipe. Name the folder of a"),
        (("model", "pairs.jsonl"), "model: the model (LlamaForCausalLM) is no reward model: it gives no score"),
        (("model", "pairs.jsonl", "--stage", "judge"), "--stage: belongs to a recipe, and model is a folder"),
        (("none.json", "pairs.jsonl"), "none of its stages is of kind rm, which makes a score"),
        (("two.json", "pairs.jsonl", "--stage", "sft"), "stage sft is of kind sft, which makes no score. Name judge."),
        (("two.json", "pairs.jsonl", "--stage", "jude"), "'jude' is no stage of one. Did you mean judge?"),
        (("one.json", "pairs.jsonl", "--set", "seed=7"), "score: stage judge is not done: judge/fetch"),
        (("one.json", "pairs.jsonl", "--out", "pairs.jsonl"), "--out pairs.jsonl: is there already"),
        (("one.json", "pairs.jsonl", "--out", "nowhere/x.jsonl"), "nothing can be written to nowhere"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_sentence(
    folder: Path, capsys: Capture, arguments: tuple[str, ...], said: str
) -> None:
    answer = score(capsys, *arguments, code=2)
    assert said in answer["error"]
    assert len(answer["problems"]) == 1
