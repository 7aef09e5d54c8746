"""A recipe runs from raw rows to an evaluated, tracked model, and only what is not done runs again."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import psutil
import pytest

from tests.flows.conftest import Server
from tests.flows.processes import mlflow_states, prefect_states
from tests.flows.toy import LONGEST, run, start, states, toy_recipe

STEPS = {
    "sft/fetch",
    "sft/render",
    "sft/tokenize",
    "sft/train",
    "sft/merge",
    "sft/fetch:held_out",
    "sft/render:held_out",
    "sft/tokenize:held_out",
    "sft/evaluate",
    "base/evaluate",
}
LEARNING_RATE = "stages.sft.learning_rate=0.02"


@pytest.fixture(autouse=True)
def served(server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of the Prefect server that all runs here use."""
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    return server.database


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, server: Server) -> dict[str, Path]:
    """One finished run that the tests of this file look at and copy."""
    root = tmp_path_factory.mktemp("done")
    recipe = toy_recipe(root / "recipe")
    answer = run("run", str(recipe), LLAMATUNER_HOME=str(root / "home"), PREFECT_API_URL=server.url)
    (root / "answer.json").write_text(json.dumps(answer))
    return {"recipe": recipe, "home": root / "home", "answer": root / "answer.json"}


@pytest.fixture
def copied(done: dict[str, Path], home: Path) -> Path:
    """A home of the test's own with everything done; the recipe's path."""
    shutil.copytree(done["home"], home, symlinks=True)
    return done["recipe"]


def test_a_fresh_run_makes_every_step_and_measures_before_and_after(done: dict[str, Path]) -> None:
    answer = json.loads(done["answer"].read_text())
    assert answer["status"] == "completed"
    assert states(answer) == dict.fromkeys(STEPS, "ran")
    before = answer["results"]["base"]["perplexity.held_out"]
    after = answer["results"]["sft"]["perplexity.held_out"]
    assert after["low"] <= after["value"] <= after["high"] < before["value"]
    assert (after["rows"], before["rows"]) == (6, 6)
    assert answer["mlflow_run_id"]
    assert answer["flow_run_id"]
    for step in answer["steps"]:
        assert len(step["key"]) == len(step["digest"]) == 64
        assert Path(step["artifact"], "manifest.json").is_file()


def test_again_nothing_runs_and_the_same_results_are_given(done: dict[str, Path], copied: Path) -> None:
    began = time.monotonic()
    again = run("run", str(copied))
    assert time.monotonic() - began < 20  # no server is started; a quiet machine takes under a second
    first = json.loads(done["answer"].read_text())
    assert (again["status"], again["results"]) == ("up-to-date", first["results"])
    assert states(again) == dict.fromkeys(STEPS, "cached")
    assert again["mlflow_run_id"] == first["mlflow_run_id"]


def test_another_learning_rate_runs_train_merge_and_evaluate_and_says_why(copied: Path, home: Path) -> None:
    planned = run("plan", str(copied), "--set", LEARNING_RATE)
    wanted = dict.fromkeys(STEPS, "cached") | {
        "sft/train": "run",
        "sft/merge": "unknown",
        "sft/evaluate": "unknown",
    }
    assert states(planned) == wanted
    why = {f"{step['stage']}/{step['step']}": step["why"] for step in planned["steps"]}
    assert why["sft/train"] == ["train.learning_rate 0.01 → 0.02"]
    damaged = next(home.glob("artifacts/tokenize/held_out-*/*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:-10])  # is made anew, and what hangs on it stays a hit: base/evaluate
    answer = run("run", str(copied), "--set", LEARNING_RATE)
    assert {title for title, state in states(answer).items() if state == "ran"} == {
        "sft/tokenize:held_out",
        "sft/train",
        "sft/merge",
        "sft/evaluate",
    }
    assert any((home / "damaged").iterdir())


def test_runtime_settings_run_nothing(copied: Path) -> None:
    settings = ("logging_steps=3", "save_steps=2", "save_total_limit=1", "per_device_eval_batch_size=1")
    given = [word for setting in settings for word in ("--set", f"stages.sft.{setting}")]
    assert run("run", str(copied), *given)["status"] == "up-to-date"


def test_renamed_files_and_a_moved_home_run_nothing(copied: Path, home: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(copied.parent, moved)
    (moved / "train.jsonl").rename(moved / "renamed.jsonl")
    (moved / "held_out.jsonl").rename(moved / "validation.jsonl")
    home.rename(tmp_path / "moved_home")
    settings = ["--set", "stages.sft.dataset=renamed.jsonl", "--set", "evaluation.perplexity=[validation.jsonl]"]
    answer = run("run", str(moved / copied.name), *settings, LLAMATUNER_HOME=str(tmp_path / "moved_home"))
    assert answer["status"] == "up-to-date"
    assert "perplexity.validation" in answer["results"]["sft"]


def test_one_more_row_runs_the_steps_behind_it(copied: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(copied.parent, moved)
    with open(moved / "train.jsonl", "a") as file:
        file.write(json.dumps({"instruction": "new", "output": "row"}) + "\n")
    planned = states(run("plan", str(moved / copied.name)))
    assert planned["sft/fetch"] == "run"
    assert planned["sft/render"] == planned["sft/tokenize"] == planned["sft/train"] == "unknown"
    assert planned["sft/tokenize:held_out"] == planned["base/evaluate"] == "cached"


def test_preview_shows_what_is_trained(copied: Path) -> None:
    rows = run("preview", str(copied), "--rows", "2")["rows"]
    assert len(rows) == 2
    assert rows[1]["text"] == "<|im_start|>user\nsay row 1<|im_end|>\n<|im_start|>assistant\nrow 1 x<|im_end|>\n"
    trained = [token for token in rows[1]["labels"] if token != -100]
    assert bytes(trained[:-1]).decode() == "row 1 x"
    assert trained[-1] == 260  # <|im_end|>
    assert rows[1]["refused"] is None


def test_prepare_is_about_the_data_only(copied: Path) -> None:
    answer = run("prepare", str(copied))
    assert answer["status"] == "up-to-date"
    assert set(states(answer)) == {
        title for title in STEPS if title.split("/")[1].split(":")[0] in ("fetch", "render", "tokenize")
    }


@pytest.mark.slow
def test_work_that_a_kill_has_left_behind_a_finished_step_is_cleared(copied: Path, home: Path) -> None:
    (manifest,) = home.glob("artifacts/merge/*/manifest.json")
    left = home / "work" / f"merge-{json.loads(manifest.read_text())['key'][:12]}"
    left.mkdir(parents=True)
    answer = run("run", str(copied))
    assert (answer["status"], {*states(answer).values()}) == ("completed", {"cached"})
    assert not left.exists()


@pytest.mark.slow
def test_an_error_found_inside_a_step_ends_every_run_as_failed(copied: Path, home: Path, served: Path) -> None:
    shutil.rmtree(home / "artifacts")
    runs, tracked = len(prefect_states(served)), len(mlflow_states(home))
    process = start("run", str(copied), "--set", "stages.sft.cutoff_len=16", "--json")
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == 2, err
    assert "train.jsonl, line 1: 36 tokens, cutoff_len is 16" in err
    assert "cutoff_len: none of 24 rows can be used. Raise cutoff_len, or set overlong: truncate" in err
    assert "Traceback" not in err
    answer = json.loads(out)
    assert answer["status"] == "failed"
    found = states(answer)
    assert found["sft/tokenize"] == "failed"
    failed = next(step for step in answer["steps"] if step["step"] == "tokenize")
    assert "cutoff_len: none of 24 rows can be used." in failed["error"]
    assert found["sft/render"] == "ran"
    assert set(mlflow_states(home)[tracked:]) == {"FAILED"}
    assert prefect_states(served)[runs:] == ["FAILED"]
    assert not (home / "artifacts" / "train").exists()
    assert [p for p in psutil.process_iter(["environ"]) if belongs(p, home)] == []


def belongs(process: psutil.Process, home: Path) -> bool:
    """Whether a process was started with this home."""
    return (process.info["environ"] or {}).get("LLAMATUNER_HOME") == str(home) and process.pid != os.getpid()


def test_the_mlflow_tree_holds_inputs_params_metrics_and_the_model(done: dict[str, Path]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{done['home'] / 'mlflow' / 'mlflow.db'}")
    root = client.get_run(json.loads(done["answer"].read_text())["mlflow_run_id"])
    runs = client.search_runs([root.info.experiment_id])
    names = {r.info.run_name: r for r in runs}
    assert {r.info.status for r in runs} == {"FINISHED"}
    stage = names["sft"]
    assert stage.data.tags["mlflow.parentRunId"] == root.info.run_id
    assert names["sft evaluation"].data.tags["mlflow.parentRunId"] == stage.info.run_id
    assert names["base evaluation"].data.tags["mlflow.parentRunId"] == root.info.run_id
    assert stage.data.params["learning_rate"] == "0.01"
    assert root.data.params["sft/learning_rate"] == "0.01"
    assert [point.step for point in client.get_metric_history(stage.info.run_id, "loss")] == [1, 2, 3, 4]
    assert {i.dataset.name for i in stage.inputs.dataset_inputs} == {"train", "held_out"}
    files = {f.path for f in client.list_artifacts(stage.info.run_id, "train")}
    assert {"train/loss.png", "train/manifest.json"} <= files
    assert "recipe.yaml" in {f.path for f in client.list_artifacts(root.info.run_id)}
    version = client.search_model_versions("name='toy-sft'")[0]
    assert version.tags["llamatuner.digest"]
    assert "perplexity.held_out" in stage.data.metrics
