"""A sweep is checked against its recipe before anything runs, and known by the content of what it is made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli.app import run_app
from flows.cli.sweep_report import sentence
from flows.sweep_plan import SweepPlan, plan_sweep
from flows.sweep_results import Compared
from flows.sweep_study import Study, Trial
from registry.home import Home
from registry.sweeps import read_sweep
from tests.flows.refusals import nothing_begun, refusal
from tests.flows.toy import PROJECT

RATE, RANK = "stages.sft.learning_rate", "stages.sft.lora_rank"
TWO = {RATE: {"low": 1e-4, "high": 1e-1, "log": True}, RANK: [2, 4, 8]}


def write(folder: Path, **values: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"metric": "perplexity.held_out", "method": "tpe", "trials": 12, **values}))
    return str(path)


def planned(folder: Path, *overrides: str, **values: Any) -> SweepPlan:
    sweep = read_sweep(write(folder, **({"parameters": TWO} | values)))
    return plan_sweep(str(folder / "toy.json"), overrides, sweep, Home.open(), "sweep.yaml")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"parameters": {"stages.sft.lerning_rate": [1e-3]}},
            "stages.sft.lerning_rate: unknown key. Did you mean",
        ),
        ({"parameters": {"stages.dpo.seed": [1]}}, "parameters.stages.dpo.seed: no stage 'dpo'"),
        ({"parameters": {"evaluation.limits": [1]}}, "evaluation.limits: unknown key. Did you mean limit?"),
        ({"parameters": {RATE: [1e-3, "fast"]}}, f"{RATE}: 'fast' should be a valid number"),
        ({"parameters": {RANK: {"low": 0, "high": 8}}}, f"{RANK}: 0 should be greater than or equal to 1"),
        ({"parameters": {"name": ["a", "b"]}}, "parameters.name: is what the recipe is called"),
        (
            {"parameters": {"stages.sft.packing": [True, False], "stages.sft.cutoff_len": [2, 160]}},
            "stages.sft.cutoff_len: 2 should be greater than or equal to 4",
        ),
        (
            {"metric": "perplexity.hold_out"},
            "metric: no evaluation of this recipe makes 'perplexity.hold_out'. Did you",
        ),
        ({"metric": "dpo.perplexity.held_out"}, "metric: no evaluation of this recipe makes 'dpo.perplexity.held_out'"),
        ({"parameters": {"stages.sft.dataset": ["no.jsonl"]}}, "no.jsonl does not exist"),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused(
    folder: Path, home: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], expected: str
) -> None:
    told = refusal(capsys, "sweep", "toy.json", write(folder, **({"parameters": TWO} | values)))
    assert expected in told
    assert nothing_begun(home)
    assert not (home / "sweeps").exists()


def test_everything_is_said_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(folder, parameters={RATE: [-1.0], RANK: ["x"], "stages.sft.sed": [1]})
    told = refusal(capsys, "sweep", "toy.json", file, "--set", f"{RATE}=1e-3")
    assert "sweep sweep.yaml over toy.json: 4 problems" in told
    for expected in (
        f"--set {RATE}=1e-3: is a parameter of the sweep",
        f"{RATE}: -1.0",
        f"{RANK}: 'x'",
        "sed: unknown",
    ):
        assert expected in told


def test_options_that_cannot_be_met_are_refused_first(
    folder: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(folder, parameters=TWO)
    told = refusal(capsys, "sweep", "toy.json", file, "--out", "toy.json", "--promote")
    assert "--out toy.json: is there; nothing is written over" in told
    assert "--promote: the recipe has no gate" in told
    assert nothing_begun(home)


def test_which_way_is_better_is_known_or_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(folder).target.direction == "minimize"
    assert planned(folder, direction="maximize").target.direction == "maximize"
    generate = "evaluation.generate=[held_out.jsonl]"
    assert planned(folder, generate, metric="bleu.held_out").target.direction == "maximize"
    file = write(folder, parameters=TWO, metric="answer_tokens.held_out")
    told = refusal(capsys, "sweep", "toy.json", file, "--set", generate)
    assert "direction: missing, and it is not known which way answer_tokens.held_out is better" in told


def test_a_number_of_several_stages_needs_its_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads((folder / "toy.json").read_text())
    raw["stages"]["more"] = raw["stages"]["sft"] | {"model": "sft"}
    (folder / "toy.json").write_text(json.dumps(raw))
    told = refusal(capsys, "sweep", "toy.json", write(folder, parameters=TWO))
    assert "is measured of sft and more. Write sft.perplexity.held_out or more.perplexity.held_out." in told
    target = planned(folder, metric="more.perplexity.held_out").target
    assert (target.label, target.metric) == ("more", "perplexity.held_out")


def test_a_sweep_is_known_by_content(folder: Path, tmp_path: Path) -> None:
    name = planned(folder).name
    assert name.startswith("toy-")
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert planned(tmp_path / "elsewhere").name == name
    assert planned(folder, "stages.sft.save_steps=7").name == name
    assert planned(folder, "evaluation.gate=['perplexity.held_out < 3']").name == name
    assert planned(folder, trials=40).name == name
    assert planned(folder, "stages.sft.max_steps=5").name != name
    assert planned(folder, seed=1).name != name
    assert planned(folder, metric="bits_per_byte.held_out").name != name
    (folder / "held_out.jsonl").write_text(json.dumps({"instruction": "new", "output": "row"}) + "\n")
    assert planned(folder).name != name


def draw(study: Study, count: int) -> list[dict[str, Any]]:
    """Values of so many trials, each told a number made of them."""
    found = []
    for _ in range(count):
        trial = study.next()
        assert trial is not None
        study.complete(trial, trial.values[RATE] * trial.values[RANK], {})
        found.append(trial.values)
    return found


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_an_interrupted_sweep_has_the_trials_of_one_that_was_not(folder: Path, tmp_path: Path, method: str) -> None:
    plan = planned(folder, method=method)
    whole = draw(Study(plan, None), 12)
    first = Study(plan, tmp_path / "study")
    found = draw(first, 5)
    left = first.next()  # and its process dies
    second = Study(plan, tmp_path / "study")
    again = second.next()
    assert left is not None
    assert again is not None
    assert (again.number, again.values) == (6, left.values)
    found += draw(second, 7)
    assert second.next() is None
    assert found == whole
    assert len({json.dumps(values) for values in whole}) > 6
    assert {type(values[RATE]) for values in whole} == {float}
    assert {values[RANK] for values in whole} <= {2, 4, 8}


def test_a_trial_cut_off_while_it_was_drawn_is_drawn_to_its_end(folder: Path, tmp_path: Path) -> None:
    import optuna

    plan = planned(folder, method="random")
    study = Study(plan, tmp_path / "study")
    draw(study, 1)
    half = optuna.load_study(study_name=plan.name, storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}").ask()
    half.suggest_float(RATE, 1e-4, 1e-1, log=True)
    again = Study(plan, tmp_path / "study").next()
    assert again is not None
    assert (again.number, again.values[RATE]) == (2, half.params[RATE])
    assert again.values[RANK] in (2, 4, 8)


def test_values_of_any_kind_come_back_as_they_were(folder: Path, tmp_path: Path) -> None:
    parameters = {"stages.sft.lora_target": ["all", ["q_proj", "v_proj"]], "stages.sft.packing": [True, False]}
    plan = planned(folder, method="grid", trials=None, parameters=parameters)
    study, found = Study(plan, tmp_path / "study"), []
    while (trial := study.next()) is not None:
        study.complete(trial, 1.0, {})
        found.append(tuple(trial.values.values()))
    assert found == [("all", True), ("all", False), (["q_proj", "v_proj"], True), (["q_proj", "v_proj"], False)]
    assert [trial.values for trial in Study(plan, tmp_path / "study").trials()] == list(plan.combinations)


def test_importances_and_pictures_are_made_of_what_is_there(folder: Path, tmp_path: Path) -> None:
    from flows.sweep_picture import draw_importances, draw_trials

    plan = planned(folder)
    study = Study(plan, None)
    assert study.importances() == {}
    draw(study, 11)
    failed = study.next()
    assert failed is not None
    study.fail(failed, {"error": "x"})
    found = study.importances()
    assert set(found) == {RATE, RANK}
    assert sum(found.values()) == pytest.approx(1.0)
    best = study.ranked()[0]
    assert best.value == min(trial.value for trial in study.trials() if trial.value is not None)
    for picture in (draw_trials(plan, study.trials(), best), draw_importances(found, 11)):
        assert picture.startswith(b"\x89PNG")


def test_a_difference_is_said_with_its_side_and_whether_it_may_be_chance() -> None:
    best = Trial(3, {}, "complete", 5.0)
    real = Compared(2, True, -1.0, -1.5, -0.5, True)
    assert sentence(real, best, "minimize") == (
        "trial 3 is better than trial 2 (the recipe as it is) by more than chance: -1 (-1.5 to -0.5)"
    )
    worse = Compared(None, True, 1.0, 0.5, 1.5, True)
    assert sentence(worse, best, "minimize").startswith("trial 3 is worse than the recipe as it is by more than chance")
    assert sentence(worse, best, "maximize").startswith("trial 3 is better than the recipe as it is by more")
    chance = Compared(1, False, -1.0, -1.5, 0.5, False)
    assert (
        sentence(chance, best, "minimize") == "trial 3 differs from trial 1 by -1 (-1.5 to +0.5), which may be chance"
    )


def test_a_dry_run_shows_trials_and_what_they_share(
    folder: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(folder, method="grid", trials=None, parameters={RATE: [1e-3, 1e-2], RANK: [2, 4]})
    assert run_app(["sweep", "toy.json", file, "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["trials"][2] == {"trial": 3, "parameters": {RATE: 1e-2, RANK: 2}}
    assert (answer["steps"]["sft/tokenize"], answer["steps"]["sft/train"]) == (1, 4)
    assert nothing_begun(home)
    file = write(folder, parameters=TWO)
    assert run_app(["sweep", "toy.json", file, "--dry-run", "--json"]) == 0
    first = draw(Study(planned(folder), None), 10)
    assert [each["parameters"] for each in json.loads(capsys.readouterr().out)["trials"]] == first


def test_the_sweep_in_the_documentation_fits_its_recipe(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (PROJECT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (tmp_path / "sweep.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert run_app(["sweep", "demo", str(tmp_path / "sweep.yaml"), "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["count"] == 6
    assert (answer["steps"]["sft/tokenize"], answer["steps"]["sft/train"]) == (1, 6)
    assert nothing_begun(home)
