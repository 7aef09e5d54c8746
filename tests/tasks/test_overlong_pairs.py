"""Answers that are compared, and a prompt too long for both: left out with a reason, never trained as nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from tests.tasks.test_data_steps import make, steps_of, write
from tests.tiny import tiny_model

LONG = {"instruction": "q" * 90, "chosen": "ok", "rejected": "no"}
MARKED = {"instruction": "q" * 90, "output": "ok", "kto_tag": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("overlong") / "tiny")


@pytest.mark.parametrize("stage", ["rm", "dpo", "orpo", "kto"])
def test_a_row_whose_prompt_leaves_no_room_for_its_answers_is_left_out_and_counted(
    model: Path, tmp_path: Path, stage: str
) -> None:
    long: dict[str, Any] = MARKED if stage == "kto" else LONG
    data = write(tmp_path / "rows.jsonl", long, long | {"instruction": "q"})
    counts = make(steps_of(model, data, stage=stage, cutoff_len=48))["tokenize"].manifest["counts"]
    assert counts["left_out"] == {"too_long": 1}
    assert (counts["rows_read"], counts["rows"]) == (2, 1)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_rows_that_are_all_too_long_end_the_run_before_training(model: Path, tmp_path: Path, stage: str) -> None:
    data = write(tmp_path / "rows.jsonl", MARKED if stage == "kto" else LONG)
    text = r"line 1: 113 tokens, cutoff_len is 48\s+cutoff_len: none of 1 rows can be used\. Raise cutoff_len\.$"
    with pytest.raises(InputError, match=text):
        make(steps_of(model, data, stage=stage, cutoff_len=48))


def test_a_pair_is_too_long_when_one_of_its_answers_is(model: Path, tmp_path: Path) -> None:
    short = {"instruction": "q", "chosen": "ok", "rejected": "no"}
    data = write(tmp_path / "rows.jsonl", short, short | {"rejected": "n" * 60}, short | {"chosen": "n" * 60})
    counts = make(steps_of(model, data, stage="dpo", cutoff_len=48, bad_rows_limit=1.0))["tokenize"].manifest["counts"]
    assert counts["left_out"] == {"too_long": 2}
