"""Pairs whose two answers are the same, as written or as rendered: left out, counted and named by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import InputError
from tasks.jsonlines import read_json_lines
from tasks.preview import rows_seen
from tests.tasks.test_data_steps import make, steps_of, write
from tests.tiny import CHAT_TEMPLATE, tiny_model

PAIR = {"instruction": "q", "chosen": "yes", "rejected": "no"}
SAME = PAIR | {"rejected": "yes"}
TRIMMED = PAIR | {"rejected": "yes \n"}
DETAIL = "'chosen' and 'rejected' are the same text once the template has rendered them"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("equal") / "tiny")


@pytest.fixture
def trimming(tmp_path: Path) -> str:
    """A template that cuts off white space at the ends of a message."""
    (tmp_path / "trim.jinja").write_text(CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"))
    return str(tmp_path / "trim.jinja")


def test_pairs_of_equal_answers_are_left_out_counted_and_named(model: Path, tmp_path: Path, trimming: str) -> None:
    data = write(tmp_path / "rows.jsonl", PAIR, SAME, TRIMMED, PAIR | {"rejected": "yes."})
    steps = steps_of(model, data, stage="rm", template=trimming, bad_rows="skip")
    made = make(steps)
    assert made["fetch"].manifest["counts"]["left_out"] == {"tie": 1}
    assert made["render"].manifest["counts"]["left_out"] == {"tie": 1}
    assert made["tokenize"].manifest["counts"]["rows"] == 2
    (line,) = read_json_lines(made["render"].path / "report" / "rejected.jsonl")
    assert (line["row"], line["place"], line["detail"]) == (2, "line 3", DETAIL)
    seen = [row.refused and row.refused.reason for row in rows_seen(steps["tokenize"], model, {}) if not row.part]
    assert seen == ["tie", "tie"]


def test_white_space_that_the_template_keeps_is_a_difference(model: Path, tmp_path: Path) -> None:
    made = make(steps_of(model, write(tmp_path / "rows.jsonl", TRIMMED), stage="rm"))
    assert made["tokenize"].manifest["counts"]["rows"] == 1


def test_a_pair_that_rendering_makes_equal_ends_the_run_as_bad_rows_says(
    model: Path, tmp_path: Path, trimming: str
) -> None:
    steps = steps_of(model, write(tmp_path / "rows.jsonl", PAIR, TRIMMED), stage="rm", template=trimming)
    with pytest.raises(InputError, match=r"line 2: 'chosen' and 'rejected' are the same text .* \[tie\]"):
        make(steps)
