"""Gate and champion: who is promoted, who is not and why, two at once, and the way back."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from flows.comparison import find_side
from flows.promotion import promote
from registry.errors import InputError
from registry.gates import condition
from registry.home import Home
from tasks.tracking import mlflow_client
from tests.flows.conftest import Server
from tests.flows.toy import toy_recipe
from tests.flows.twins import work_here

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
RUNS: dict[str, list[str]] = {
    "first": [],
    "better": ["--set", "stages.sft.max_steps=40"],
    "worse": ["--set", "stages.sft.max_steps=1"],
}
SURE = "perplexity.held_out - champion <= 0 at 95%"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: Server) -> tuple[Path, dict[str, str]]:
    """A home with a run of each kind, and their ids."""
    root = tmp_path_factory.mktemp("promoted")
    recipe, ids = toy_recipe(root / "recipe", max_steps=12), dict[str, str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMATUNER_HOME", str(root / "home"))
        patch.setenv("PREFECT_API_URL", server.url)
        work_here(patch)
        for name, overrides in RUNS.items():
            assert run_app(["run", str(recipe), *overrides]) == 0
            ids[name] = max(path.stem for path in (root / "home" / "runs").glob("*.json"))
    return root / "home", ids


@pytest.fixture
def ids(made: tuple[Path, dict[str, str]], home: Path) -> dict[str, str]:
    """Runs by name, in a home of the test's own; MLflow's database goes with it."""
    shutil.copytree(made[0], home, symlinks=True)
    return made[1]


def ask(capsys: Capture, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert run_app([*arguments, "--json"]) == code
    out, err = capsys.readouterr()
    answer: dict[str, Any] = json.loads(out)
    return answer, err


def champion(home: Path) -> str | None:
    found: str | None = mlflow_client(Home(home)).get_registered_model("toy-sft").aliases.get("champion")
    return None if found is None else str(found)


def test_the_better_one_is_promoted_and_the_worse_is_not(ids: dict[str, str], home: Path, capsys: Capture) -> None:
    first, told = ask(capsys, "promote", ids["first"], "--gate", SURE)
    assert first["conditions"][0]["reason"] == "there is no champion yet"
    assert "toy-sft version" in told
    assert champion(home) == first["version"]
    refused, told = ask(capsys, "promote", ids["worse"], "--gate", SURE, code=1)
    (found,) = refused["conditions"]
    assert (refused["passed"], found["met"]) == (False, False)
    assert 0 < found["low"] < found["value"] < found["high"]
    assert "Failed gate: toy-sft version" in told
    assert champion(home) == first["version"]
    better, _ = ask(capsys, "promote", ids["better"], "--gate", SURE)
    assert better["conditions"][0]["high"] < 0
    assert better["champion_before"] == first["version"]
    assert champion(home) == better["version"]


def test_what_may_be_chance_is_refused_where_the_whole_interval_counts(
    ids: dict[str, str], home: Path, capsys: Capture
) -> None:
    first, _ = ask(capsys, "promote", ids["first"], "--gate", SURE)
    compared, _ = ask(capsys, "compare", ids["first"], ids["better"])
    found = compared["metrics"][0]["differences"][1]
    enough = (found["value"] + found["high"]) / 2  # it is better by that much, but not by more than chance
    gate = f"perplexity.held_out - champion <= {enough}"
    refused, _ = ask(capsys, "promote", ids["better"], "--gate", f"{gate} at 95%", code=1)
    (checked,) = refused["conditions"]
    assert {name: checked[name] for name in ("value", "low", "high")} == {
        name: found[name] for name in ("value", "low", "high")
    }
    assert champion(home) == first["version"]
    passed, _ = ask(capsys, "promote", ids["better"], "--gate", gate)
    assert champion(home) == passed["version"] != first["version"]


def test_one_row_has_no_interval_and_decides_nothing_where_the_whole_interval_counts(
    ids: dict[str, str], home: Path, capsys: Capture
) -> None:
    recipe = str(home.parent / "recipe" / "toy.json")
    one = toy_recipe(home.parent / "recipe", 12).parent / "one.jsonl"
    one.write_text((one.parent / "held_out.jsonl").read_text().splitlines()[0] + "\n")
    measured, _ = ask(capsys, "run", recipe, "--set", "evaluation.perplexity=[one.jsonl]")
    found, before = (measured["results"][name]["perplexity.one"] for name in ("sft", "base"))
    assert found["value"] < before["value"]
    assert "low" not in found
    run = max(path.stem for path in (home / "runs").glob("*.json"))
    refused, told = ask(capsys, "promote", run, "--gate", "perplexity.one - base < 0 at 95%", code=1)
    assert refused["conditions"][0]["value"] == pytest.approx(found["value"] - before["value"])
    assert "one row is too few for an interval" in " ".join(told.split())
    passed, _ = ask(capsys, "promote", run, "--gate", "perplexity.one - base < 0")
    assert passed["passed"]


@pytest.mark.parametrize(("sign", "passes"), [("<=", True), ("<", False)])
def test_an_equal_one_is_promoted_as_the_rule_says(
    ids: dict[str, str], home: Path, capsys: Capture, sign: str, passes: bool
) -> None:
    first, _ = ask(capsys, "promote", ids["first"], "--gate", "perplexity.held_out > 0")
    gate = f"perplexity.held_out - champion {sign} 0 at 95%"
    again, _ = ask(capsys, "promote", ids["first"], "--gate", gate, code=0 if passes else 1)
    (found,) = again["conditions"]
    assert (found["value"], found["low"], found["high"], found["met"]) == (0.0, 0.0, 0.0, passes)
    assert champion(home) == first["version"]


def test_rolling_back_restores_the_champion_before(ids: dict[str, str], home: Path, capsys: Capture) -> None:
    versions = [
        ask(capsys, "promote", ids[name], "--gate", "perplexity.held_out - base < 0")[0]["version"]
        for name in ("worse", "first", "better")
    ]
    for present, before in ((versions[2], versions[1]), (versions[1], versions[0])):
        assert champion(home) == present
        answer, _ = ask(capsys, "rollback", "toy-sft")
        assert answer == {"model": "toy-sft", "version": before, "instead_of": present}
    assert champion(home) == versions[0]
    answer, _ = ask(capsys, "rollback", "toy-sft", code=2)
    assert "there was no champion before" in answer["error"]
    answer, _ = ask(capsys, "rollback", "toy-stf", code=2)
    assert "no model of that name is registered. Did you mean toy-sft?" in answer["error"]


def test_what_was_promoted_is_kept_when_old_artifacts_go(ids: dict[str, str], home: Path, capsys: Capture) -> None:
    ask(capsys, "promote", ids["first"], "--gate", "perplexity.held_out > 0")
    capsys.readouterr()
    assert run_app(["artifacts", "gc", "--keep-runs", "0"]) == 0
    assert find_side(ids["first"], Home(home)).model().path.is_dir()
    with pytest.raises(InputError, match="is gone or damaged"):
        find_side(ids["worse"], Home(home))


def test_of_two_promotions_at_once_one_champion_is_left_and_the_other_was_it_before(
    ids: dict[str, str], home: Path
) -> None:
    gate, records = [condition("perplexity.held_out > 0")], list[dict[str, Any]]()
    sides = [find_side(ids[name], Home(home)) for name in ("first", "better")]
    threads = [
        threading.Thread(target=lambda side=side: records.append(promote(side, gate, Home(home)))) for side in sides
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = sorted(records, key=lambda record: record["champion_before"] is not None)
    assert one["champion_before"] is None
    assert two["champion_before"] == one["version"]
    assert champion(home) == two["version"]


def test_what_was_decided_is_kept_with_every_number(ids: dict[str, str], home: Path, capsys: Capture) -> None:
    gates = ["perplexity.held_out < 1e9", "perplexity.held_out - base < 0 at 95%", "perplexity.held_out < 0"]
    record, _ = ask(capsys, "promote", ids["better"], *(part for gate in gates for part in ("--gate", gate)), code=1)
    assert [each["met"] for each in record["conditions"]] == [True, True, False]
    assert champion(home) is None
    client = mlflow_client(Home(home))
    version = client.get_model_version("toy-sft", record["version"])
    assert version.tags["llamatuner.gate"] == "failed"
    kept = Path(client.download_artifacts(version.run_id, "gate.json", str(home)))
    assert json.loads(kept.read_text()) == record


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("perplexity.held_out below 3", "is no condition. E.g."),
        ("perplexity.held_out - best < 0", "'best' is neither base nor champion"),
        ("perplexity.heldout < 3", "perplexity.heldout was not measured. Did you mean perplexity.held_out"),
    ],
)
def test_a_gate_that_makes_no_sense_moves_nothing(
    ids: dict[str, str], home: Path, capsys: Capture, gate: str, words: str
) -> None:
    answer, _ = ask(capsys, "promote", ids["first"], "--gate", gate, code=2)
    assert words in answer["error"]
    assert champion(home) is None
    answer, _ = ask(capsys, "promote", ids["first"], code=2)
    assert "nothing says when a model is good enough" in answer["error"]


def test_a_recipe_with_a_gate_promotes_what_passes_and_a_gate_that_fails_is_no_failed_run(
    made: tuple[Path, dict[str, str]],
    ids: dict[str, str],
    home: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    work_here(monkeypatch)
    recipe = str(made[0].parent / "recipe" / "toy.json")
    gate = ["--set", 'evaluation.gate=["perplexity.held_out - base < 0 at 95%", "perplexity.held_out < 1e6"]']
    passed, told = ask(capsys, "run", recipe, "--set", "stages.sft.max_steps=3", *gate)
    assert (passed["status"], passed["gate"]["passed"]) == ("completed", True)
    assert "is the champion" in told
    assert champion(home) == passed["gate"]["version"]
    gate[1] = gate[1].replace("1e6", "1")
    failed, told = ask(capsys, "run", recipe, "--set", "stages.sft.max_steps=4", *gate)
    assert (failed["status"], failed["gate"]["passed"]) == ("completed", False)
    assert "Failed gate" in told
    assert champion(home) == passed["gate"]["version"]
    again, _ = ask(capsys, "run", recipe, "--set", "stages.sft.max_steps=4", *gate)
    assert (again["status"], again["gate"]) == ("up-to-date", failed["gate"])  # it was decided once
    gate[1] = 'evaluation.gate=["perplexity.held_uot < 3", "nonsense"]'
    refused, _ = ask(capsys, "run", recipe, *gate, code=2)
    assert "'nonsense' is no condition" in refused["error"]
    gate[1] = 'evaluation.gate=["perplexity.held_uot < 3"]'
    refused, _ = ask(capsys, "run", recipe, *gate, code=2)
    assert "stage sft has no perplexity.held_uot. Did you mean perplexity.held_out?" in refused["error"]


def test_a_condition_on_the_whole_interval_looks_at_its_worse_end() -> None:
    sure, value = condition("m - champion >= -0.1 at 95%"), condition("m - champion >= -0.1")
    assert (sure.metric, sure.other, sure.sign, sure.number, sure.sure) == ("m", "champion", ">=", -0.1, True)
    assert [sure.holds(0.0, low, 1.0) for low in (-0.2, -0.1, 0.0)] == [False, True, True]
    assert value.holds(0.0, -0.2, 1.0)
    below = condition("m<2.5e-1 at 95 %")
    assert [below.holds(0.1, 0.0, high) for high in (0.2, 0.3)] == [True, False]
    with pytest.raises(InputError, match="is no condition"):
        condition("m == 3")
