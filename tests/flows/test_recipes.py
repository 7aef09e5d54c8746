"""Every shipped recipe runs whole, as its tiny twin; and what one failed stage leaves of a chain.

One decision: all twins share a home, as recipes do that people run one after the other, so a stage that several of
them have is trained once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import services
from flows.cli.app import run_app
from flows.graph import build
from registry.home import Home
from registry.loading import load_recipe
from registry.recipes import RECIPES
from tests.flows.conftest import Server
from tests.flows.toy import states
from tests.flows.twins import twin, work_here, write_twin
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
CHAINS = {
    "demo": ["sft"],
    "orpo": ["orpo"],
    "pt_sft_dpo": ["pt", "sft", "dpo"],
    "sft_dpo": ["sft", "dpo"],
    "sft_kto": ["sft", "kto"],
    "sft_rm_grpo": ["sft", "rm", "grpo"],
    "sft_rm_ppo": ["sft", "rm", "ppo"],
}
"""Recipe → its stages, in the order in which they are done."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, the twins' recipes and the home they share."""
    folder = tmp_path_factory.mktemp("twins")
    tiny_model(folder / "model")
    return folder


@pytest.fixture
def place(shared: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, with the environment set for a run in this process, which leaves nothing in it."""
    monkeypatch.setenv("LLAMATUNER_HOME", str(shared / "home"))
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    work_here(monkeypatch)
    yield shared
    assert "MLFLOW_TRACKING_URI" not in os.environ


def ask(capsys: Capture, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The one JSON line of a command, and what it told people."""
    capsys.readouterr()
    ended = run_app([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert ended == code, err
    answer: dict[str, Any] = json.loads(out)
    return answer, err


def titles(answer: dict[str, Any], state: str) -> set[str]:
    return {title for title, found in states(answer).items() if found == state}


def tracked(home: Path, run_id: str) -> dict[str, str]:
    """MLflow's state of each stage of a run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    runs = client.search_runs([client.get_run(run_id).info.experiment_id])
    stages = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == run_id]
    return {run.info.run_name: run.info.status for run in stages if "evaluation" not in run.info.run_name}


def test_every_shipped_recipe_has_a_twin_that_takes_the_same_steps(shared: Path, home: Path) -> None:
    assert list(RECIPES) == sorted(CHAINS)
    for name, stages in CHAINS.items():
        recipe, small = load_recipe(name), load_recipe(twin(name, shared / "model"))
        assert [stage.name for stage in recipe.stages] == stages
        steps, tiny = ({step.title for step in build(r, Home(home)).steps} for r in (recipe, small))
        assert steps == tiny | {"base/model"}  # of a twin it is a folder that is there


@pytest.mark.parametrize("name", CHAINS)
def test_a_recipe_runs_whole_and_then_there_is_nothing_to_do(name: str, place: Path, capsys: Capture) -> None:
    recipe = write_twin(twin(name, place / "model"), place)
    first, _ = ask(capsys, "run", recipe)
    assert first["status"] == "completed"
    assert {f"{stage}/{step}" for stage in CHAINS[name] for step in ("train", "merge", "evaluate")} <= {*states(first)}
    assert [first["results"][stage]["train.steps"] for stage in CHAINS[name]] == [{"value": 3}] * len(CHAINS[name])
    again, _ = ask(capsys, "run", recipe)
    assert (again["status"], again["results"]) == ("up-to-date", first["results"])
    assert titles(again, "cached") == set(states(first))


def test_the_card_of_a_policy_says_what_scored_its_answers(place: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = write_twin(twin("sft_rm_ppo", place / "model"), place)
    ask(capsys, "run", recipe)
    ask(capsys, "export", recipe, "--to", str(tmp_path / "policy"))
    card = (tmp_path / "policy" / "README.md").read_text()
    assert re.search(r"\| ppo/train \| ppo, lora, from sft, its answers scored by rm \(digest [0-9a-f]{64}\)", card)


def test_sft_kto_finds_the_sft_of_sft_dpo_done(place: Path, capsys: Capture) -> None:
    ask(capsys, "run", write_twin(twin("sft_dpo", place / "model"), place))
    plan, _ = ask(capsys, "plan", write_twin(twin("sft_kto", place / "model"), place))
    own = {f"sft/{step}" for step in ("fetch", "render", "tokenize", "train", "merge", "evaluate")}
    assert own <= titles(plan, "cached")


def test_a_stage_that_fails_leaves_the_others_and_says_what_did_not_run(
    place: Path, server: Server, capsys: Capture
) -> None:
    raw = twin("sft_dpo", place / "model") | {"name": "branches"}
    raw["stages"]["kto"] = twin("sft_kto", place / "model")["stages"]["kto"]
    for stage in raw["stages"].values():
        stage["seed"] = 7  # so that nothing of it is done yet
    recipe = write_twin(raw, place)
    answer, told = ask(capsys, "run", recipe, "--set", "stages.kto.learning_rate=1e38", code=1)
    assert answer["status"] == "failed"
    # what needs no model does not wait for one
    assert told.index(f"{'kto/fetch':<34} started") < told.index(f"{'sft/train':<34} done")
    assert titles(answer, "failed") == {"kto/train"}
    assert titles(answer, "not_run") == {"kto/merge", "kto/evaluate"}
    assert [step["because"] for step in answer["steps"] if step["state"] == "not_run"] == [["kto/train"]] * 2
    assert {"dpo/train", "dpo/merge", "dpo/evaluate", "sft/evaluate:kto"} <= titles(answer, "ran")
    assert "perplexity.assistant_held_out" in answer["results"]["dpo"]
    assert "kto/train failed; not run because of it: kto/merge, kto/evaluate\nbranches: failed" in told
    assert told.splitlines()[-1].startswith("error: loss is not finite at step 3: nan at learning rate 5e+37.")
    state = services.ask(f"{server.url}/flow_runs/{answer['flow_run_id']}")["state"]
    assert state["type"] == "FAILED"
    assert tracked(place / "home", answer["mlflow_run_id"]) == {"sft": "FINISHED", "dpo": "FINISHED", "kto": "FAILED"}
    cured, _ = ask(capsys, "run", recipe)
    assert titles(cured, "ran") == {"kto/train", "kto/merge", "kto/evaluate"}
    assert cured["status"] == "completed"
