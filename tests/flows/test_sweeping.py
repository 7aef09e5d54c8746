"""A sweep that is killed goes on where it was, and what it came to can be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from flows.planning import plan
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Store
from tasks.locks import try_lock
from tests.flows.conftest import Server
from tests.flows.processes import (
    checkpoint,
    kill,
    mlflow_states,
    prefect_pages,
    prefect_states,
    record_states,
    require_gone,
    tree,
    wait_until,
)
from tests.flows.toy import LONGEST, run, start, toy_recipe

pytestmark = pytest.mark.slow
STEPS = 16
GRID = {"stages.sft.learning_rate": [1e-2, 2e-2, 1e30], "stages.sft.logging_steps": [1, 2]}


def write_sweep(folder: Path) -> tuple[str, str]:
    """A grid of six trials over a tiny recipe: two trainings, measured, and one that cannot end; the two files."""
    recipe = toy_recipe(folder, steps=STEPS, finetuning_type="full", learning_rate=2e-2)
    raw = json.loads(recipe.read_text())
    del raw["stages"]["sft"]["lora_rank"]
    raw["evaluation"] = {"perplexity": ["held_out.jsonl"], "compare_with": "none"}
    recipe.write_text(json.dumps(raw))
    sweep = folder / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"metric": "perplexity.held_out", "method": "grid", "parameters": GRID}))
    return str(recipe), str(sweep)


def records(home: Path) -> list[dict[str, Any]]:
    """Run records of trials, oldest first."""
    found = [json.loads(path.read_text()) for path in sorted((home / "runs").glob("*.json"))]
    return [record for record in found if "sweep" not in record["recipe"]]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, server: Server) -> dict[str, Any]:
    """A sweep whose process was killed while it trained in its third trial, and the same command again."""
    root = tmp_path_factory.mktemp("swept")
    files, home = write_sweep(root / "recipe"), root / "home"
    environment = {"LLAMATUNER_HOME": str(home), "PREFECT_API_URL": server.url}
    process = start("sweep", *files, "--json", **environment)
    wait_until(lambda: len(records(home)) == 3 and checkpoint(home) > 3, process)
    family = tree(process)
    kill(family[:1])
    require_gone(family[1:], seconds=5)
    process.communicate()
    before = records(home)
    process = start("sweep", *files, "--json", **environment)
    out, err = process.communicate(timeout=LONGEST)
    answer = json.loads(out)
    return {"files": files, "home": home, "before": before, "code": process.returncode, "answer": answer, "told": err}


@pytest.fixture
def copied(swept: dict[str, Any], home: Path) -> tuple[str, str]:
    """A home of the test's own with everything done; the recipe and the sweep."""
    shutil.copytree(swept["home"], home, symlinks=True)
    return swept["files"]


def test_finished_trials_are_kept_the_dead_one_goes_on_and_the_rest_run(swept: dict[str, Any], server: Server) -> None:
    answer, before = swept["answer"], swept["before"]
    trials = answer["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 4 + ["failed"] * 2
    assert [tuple(trial["parameters"].values()) for trial in trials] == [
        (rate, steps) for rate in GRID["stages.sft.learning_rate"] for steps in GRID["stages.sft.logging_steps"]
    ]
    after = records(swept["home"])
    assert [record["status"] for record in after] == ["completed", "completed", "crashed"] + ["completed"] * 2 + [
        "failed"
    ] * 2
    assert [record["id"] for record in before] == [record["id"] for record in after[:3]]
    assert [trial["run"] for trial in trials] == [record["id"] for record in after[:2] + after[3:]]
    trained = {step["step"]: step for step in after[3]["steps"]}["train"]
    assert trained["state"] == "ran"
    assert trained["resumed_from"] > 3
    assert "2 of 6 trials done" in swept["told"]
    assert "trial 3 of 6: learning_rate 0.02, logging_steps 1" in swept["told"]
    assert "RUNNING" not in mlflow_states(swept["home"]) + prefect_states(server.database)
    assert "running" not in record_states(swept["home"])


def test_only_what_a_parameter_changes_runs_again(swept: dict[str, Any]) -> None:
    made = [trial["steps_made"] for trial in swept["answer"]["trials"]]
    assert made[0] == 8  # fetch, render, tokenize twice, train, evaluate
    assert made[1:4] == [0, 2, 0]
    keys = {(step["step"], step["key"]) for record in records(swept["home"]) for step in record["steps"]}
    assert sorted(name for name, _ in keys).count("tokenize") == 1


def test_failed_trials_are_shown_and_counted(swept: dict[str, Any]) -> None:
    assert swept["code"] == 1
    assert swept["answer"]["status"] == "failed"
    for trial in swept["answer"]["trials"][4:]:
        assert trial["value"] is None
        assert "not finite" in trial["error"]
    assert "trial 5 failed: " in swept["told"]


def test_the_best_is_compared_with_the_others_row_by_row(swept: dict[str, Any]) -> None:
    answer = swept["answer"]
    best = answer["best"]
    assert best == min(answer["trials"][:4], key=lambda trial: trial["value"])
    assert best["low"] <= best["value"] <= best["high"]
    (other,) = answer["compared"]  # the next one has the same weights; the recipe as it is is the other training
    assert other["as_written"]
    assert other["value"] < 0
    assert other["low"] <= other["value"] <= other["high"]
    assert other["real"] == (other["high"] < 0)
    assert f"trial {best['trial']} " in swept["told"]


def test_trials_are_comparable_runs_below_the_sweeps_in_mlflow(swept: dict[str, Any]) -> None:
    client = MlflowClient(f"sqlite:///{swept['home'] / 'mlflow' / 'mlflow.db'}")
    parent = client.get_run(swept["answer"]["mlflow_run_id"])
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], below, order_by=["attributes.start_time"])
    assert [child.info.run_name for child in children] == [f"trial {n}" for n in (1, 2, 3, 3, 4, 5, 6)]
    assert [child.info.status for child in children] == [
        *("FINISHED", "FINISHED", "KILLED", "FINISHED", "FINISHED", "FAILED", "FAILED")
    ]
    assert children[3].data.params["stages.sft.learning_rate"] == "0.02"
    assert children[3].data.params["sft/learning_rate"] == "0.02"
    assert children[3].data.metrics["sft/perplexity.held_out"] == swept["answer"]["trials"][2]["value"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["perplexity.held_out"] == swept["answer"]["best"]["value"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"parallel_coordinates.png", "importance.png", "sweep.json", "sweep.yaml", "recipe.yaml"} <= files
    folder = Path(swept["answer"]["folder"])
    assert {"study.db", "best.yaml", "parallel_coordinates.png", "importance.png"} <= {
        path.name for path in folder.iterdir()
    }


def test_prefect_shows_the_sweep(swept: dict[str, Any], server: Server) -> None:
    assert f"sweep-{swept['answer']['sweep']}" in prefect_pages(server.database)


def test_again_nothing_runs_and_the_best_goes_on(copied: tuple[str, str], home: Path, tmp_path: Path) -> None:
    runs, tracked = record_states(home), mlflow_states(home)
    out = tmp_path / "best.yaml"
    gate = ["--set", "evaluation.gate=['perplexity.held_out < 1e9']"]
    answer = run("sweep", *copied, *gate, "--promote", "--out", str(out), code=1)  # two trials have failed
    assert (record_states(home), mlflow_states(home)) == (runs, tracked)
    best = answer["best"]
    assert answer["gate"]["passed"]
    assert answer["gate"]["run"] == best["run"]
    recipe = load_recipe(str(out))
    assert recipe.stages[0].train.learning_rate == best["parameters"]["stages.sft.learning_rate"]
    assert recipe.evaluation.gate == ("perplexity.held_out < 1e9",)
    from flows.graph import build

    lines = plan(build(recipe, Home(home)), Store(Home(home)))
    assert {line.state for line in lines} == {"cached"}
    told = run("sweep", *copied, "--out", str(out), code=2)
    assert told["status"] == "failed"
    assert "is there; nothing is written over" in told["error"]


def test_gc_keeps_what_the_best_trial_is_made_of(copied: tuple[str, str], home: Path) -> None:
    run("artifacts", "gc", "--keep-runs", "1")
    best = next((home / "sweeps").glob("*/best.yaml"))
    assert run("run", str(best))["status"] == "up-to-date"


def test_of_two_at_once_the_second_waits(copied: tuple[str, str], home: Path, swept: dict[str, Any]) -> None:
    lock = home / "locks" / f"sweep-{swept['answer']['sweep']}.lock"
    with try_lock(lock) as held:
        assert held
        process = start("sweep", *copied, "--json")
        told = ""
        assert process.stderr is not None
        while "waiting for process" not in told:
            told = process.stderr.readline()
            assert told or process.poll() is None
    out, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    assert json.loads(out)["best"] == swept["answer"]["best"]


def test_what_is_no_trials_fault_leaves_it_open(tmp_path: Path, server: Server) -> None:
    recipe, sweep = write_sweep(tmp_path / "recipe")
    nowhere = {"stages.sft.dataset": ["http://127.0.0.1:9/rows.jsonl"]}  # nothing listens there
    raw = yaml.safe_load(Path(sweep).read_text())
    Path(sweep).write_text(yaml.safe_dump(raw | {"parameters": nowhere}))
    answer = run("sweep", recipe, sweep, code=1, PREFECT_API_URL=server.url)
    assert answer["status"] == "failed"
    assert answer["best"] is None
    assert [(trial["state"], trial["parameters"]) for trial in answer["trials"]] == [
        ("running", {"stages.sft.dataset": "http://127.0.0.1:9/rows.jsonl"})
    ]


def test_a_trial_whose_time_is_over_has_failed_and_the_next_one_begins(tmp_path: Path, server: Server) -> None:
    recipe, sweep = write_sweep(tmp_path / "recipe")
    raw = yaml.safe_load(Path(sweep).read_text())
    Path(sweep).write_text(yaml.safe_dump(raw | {"parameters": {"stages.sft.learning_rate": [1e-2, 2e-2]}}))
    limits = ("--set", "timeout_minutes=0.05", "--set", "stages.sft.max_steps=5000")
    answer = run("sweep", recipe, sweep, *limits, code=1, PREFECT_API_URL=server.url)
    assert [trial["state"] for trial in answer["trials"]] == ["failed", "failed"]
    assert all("more than its 0.05 minutes" in trial["error"] for trial in answer["trials"])
