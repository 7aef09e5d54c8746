"""Sweep files are read strictly: everything wrong is said at once, with place, rule and cure."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry import sweeps
from registry.errors import InputError
from registry.sweeps import Choices, Range, read_sweep

RATE = "stages.sft.learning_rate"


def read(folder: Path, **values: Any) -> sweeps.Sweep:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"metric": "perplexity.mine", "method": "grid", **values}))
    return read_sweep(str(path))


def refused(folder: Path, **values: Any) -> list[str]:
    with pytest.raises(InputError) as refusal:
        read(folder, **values)
    return [str(problem) for problem in refusal.value.problems]


def test_values_are_lists_or_ranges_of_what_the_setting_takes(tmp_path: Path) -> None:
    parameters = {
        RATE: {"low": 1, "high": 2, "step": 0.5},
        "stages.sft.lora_rank": {"low": 4, "high": 6},
        "stages.sft.lr_scheduler_type": ["linear", "cosine"],
        "max_steps": [1, None],
    }
    found = read(tmp_path, parameters=parameters)
    assert found.space == {
        RATE: Range(1.0, 2.0, False, 0.5, False),
        "stages.sft.lora_rank": Range(4.0, 6.0, False, 1.0, True),
        "stages.sft.lr_scheduler_type": Choices(("linear", "cosine")),
        "max_steps": Choices((1, None)),
    }
    assert found.space[RATE].grid() == (1.0, 1.5, 2.0)
    whole = found.space["stages.sft.lora_rank"].grid()
    assert whole == (4, 5, 6)
    assert all(type(number) is int for number in whole or ())
    assert found.settings.seed == 42


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    told = refused(
        tmp_path,
        methd="tpe",
        method="gird",
        seed=-1,
        parameters={
            RATE: {"low": 1.0, "hihg": 2.0},
            "a": 3,
            "b": [],
            "c": [1, 1],
            "d": {"low": 2, "high": 1},
            "e": {"low": 0, "high": 1, "log": True, "step": 1},
            "f": {"low": 0, "high": 1, "step": 0.3},
            "lora_rank": {"low": 1.5, "high": 8},
            "evaluation": [{}],
            "evaluation.limit": [1, 2],
        },
    )
    for expected in (
        "methd: unknown key. Did you mean method?",
        "method: 'gird' should be 'grid', 'random' or 'tpe'",
        "seed: -1 should be greater than or equal to 0",
        f"parameters.{RATE}.hihg: unknown key. Did you mean high?",
        f"parameters.{RATE}.high: missing, and it has no default. Largest value.",
        "parameters.a: 3 is neither a list of values nor a range. E.g. [",
        "parameters.b: the list is empty",
        "parameters.c: 1 is there twice",
        "parameters.d.high: 1 is not above low 2",
        "parameters.e.low: 0 has no logarithm",
        "parameters.e.step: steps are even",
        "parameters.f.high: steps of 0.3 from 0 do not reach 1. E.g. 0.9.",
        "parameters.lora_rank.low: 1.5 is no whole number",
        "parameters.evaluation: another parameter is inside it",
    ):
        assert any(line.startswith(expected) for line in told), (expected, told)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"parameters": {}}, "parameters: {} is empty"),
        ({"parameters": None}, "parameters: null should be an object"),
        ({}, "parameters: missing"),
        ({"parameters": {"seed": [1]}, "metric": ""}, "metric: ''"),
        ({"parameters": {"seed": [1]}, "direction": "down"}, "direction: 'down' should be 'minimize' or 'maximize'"),
        ({"parameters": {"seed": [1]}, "trials": 3}, "trials: 3 has no effect with method grid"),
        ({"parameters": {"seed": [1]}, "method": "tpe"}, "trials: missing, and method tpe has no end of its own"),
        ({"parameters": {RATE: {"low": 0.1, "high": 1.0}}}, f"parameters.{RATE}: a grid needs single values"),
    ],
)
def test_one_thing_wrong(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    told = refused(tmp_path, **values)
    assert any(line.startswith(expected) for line in told), told


def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the sweep file does not exist"):
        read_sweep(str(tmp_path / "no.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="a sweep is a mapping of metric, method and parameters"):
        read_sweep(str(tmp_path / "list.yaml"))
    (tmp_path / "date.yaml").write_text("metric: m\nmethod: grid\nparameters: {seed: [2024-01-01]}\n")
    with pytest.raises(InputError, match="only text, numbers"):
        read_sweep(str(tmp_path / "date.yaml"))


def test_the_examples_in_the_words_of_the_module_hold() -> None:
    assert doctest.testmod(sweeps).failed == 0
