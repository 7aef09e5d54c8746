"""Keys are exact: equal values give equal keys in any process, and nothing unknown gets in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.fingerprint import canonical, canonical_json, fingerprint


def test_the_order_of_keys_and_of_sets_does_not_matter() -> None:
    assert fingerprint({"a": 1, "b": {"x", "y"}}) == fingerprint({"b": {"y", "x"}, "a": 1})


def test_int_float_and_bool_are_kept_apart() -> None:
    assert len({fingerprint(value) for value in (1, 1.0, True, "1")}) == 4


def test_the_key_of_a_known_value_is_this_one() -> None:
    assert canonical_json({"b": {2, 1}, "a": 1.0, "c": [None, "ü"]}) == '{"a":1.0,"b":[1,2],"c":[null,"ü"]}'
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@pytest.mark.parametrize("value", [Path("x"), print, object(), {1: "int key"}, b"bytes"])
def test_a_type_it_does_not_know_is_an_error_that_says_where(value: object) -> None:
    with pytest.raises(TypeError, match=r"settings\.field|settings has the key"):
        canonical(value if isinstance(value, dict) else {"field": value}, "settings")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        fingerprint({"learning_rate": value})


def test_the_key_is_the_same_under_three_hash_seeds() -> None:
    code = "from tasks.fingerprint import fingerprint; print(fingerprint({'s': {'a', 'b', 'c'}, 'f': 1e-4}))"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(keys) == 1
