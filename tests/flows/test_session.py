"""What a run says of steps that failed and of those that could not run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.graph import build
from flows.session import Session
from flows.view import LogView
from registry.errors import InputError, Problem
from registry.home import Home
from registry.loading import load_recipe
from tasks.launch import ProgramFailed
from tasks.locks import Interrupted


@pytest.fixture
def session(home: Path) -> Iterator[Session]:
    """A run of sft → dpo and sft → kto in which nothing has begun."""
    raw = dict(load_recipe("sft_dpo").raw)
    raw["stages"] = raw["stages"] | {"kto": load_recipe("sft_kto").raw["stages"]["kto"]}
    opened = Home.open()
    session = Session(build(load_recipe(raw), opened), opened, LogView(lambda line: None))
    yield session
    session.record.end(session.status())


def test_one_failure_is_told_in_its_own_words(session: Session) -> None:
    session.failed["kto/train"] = ProgramFailed("not_finite", "loss is not finite at step 3")
    assert session.error_text() == "loss is not finite at step 3"
    assert session.failures() == ["kto/train failed; not run because of it: kto/merge, kto/evaluate"]
    assert session.not_run() == {"kto/merge": ["kto/train"], "kto/evaluate": ["kto/train"]}


def test_several_failures_are_all_told_each_with_its_step(session: Session) -> None:
    session.failed["kto/train"] = ProgramFailed("not_finite", "loss is not finite at step 3")
    session.failed["kto/fetch:assistant_held_out"] = InputError(Problem("rows.jsonl, line 1", "no answer"))
    assert session.error_text() == (
        "kto/train: loss is not finite at step 3\nkto/fetch:assistant_held_out: rows.jsonl, line 1: no answer"
    )
    because = {title: causes for title, causes in session.not_run().items() if len(causes) == 2}
    assert because == {"kto/evaluate": ["kto/fetch:assistant_held_out", "kto/train"]}


def test_a_cause_that_several_steps_met_is_told_once(session: Session) -> None:
    for title in ("kto/fetch:assistant_held_out", "dpo/fetch:assistant_held_out"):
        session.failed[title] = InputError(Problem("rows.jsonl, line 1", "no answer"))
    assert session.error_text() == "rows.jsonl, line 1: no answer"
    assert [line.split(" failed; ")[0] for line in session.failures()] == list(session.failed)


def test_what_fails_first_stops_every_stage_behind_it(session: Session) -> None:
    session.failed["sft/train"] = ProgramFailed("killed", "was ended by signal 9")
    stages = {title.split("/")[0] for title in session.not_run()}
    assert stages == {"sft", "dpo", "kto"}
    assert {line["state"] for line in session.steps_json()} == {"failed", "not_run"}
    assert "dpo/fetch" not in session.not_run()  # rows are read whatever becomes of a model


def test_a_run_that_was_stopped_has_failed_in_nothing(session: Session) -> None:
    session.failed["sft/train"] = Interrupted()
    assert (session.error_text(), session.failures(), session.not_run()) == (None, [], {})


def test_a_run_whose_time_is_over_has_failed_and_says_so(home: Path) -> None:
    opened, said = Home.open(), list[str]()
    recipe = load_recipe("sft_dpo", ["timeout_minutes=0.001"])
    session = Session(build(recipe, opened), opened, LogView(said.append))
    with session.timed():
        assert session.stop.wait(60)
    text = "the run took more than its 0.001 minutes (timeout_minutes) and was stopped"
    assert said == [text]
    assert session.finish() == "failed"
    assert session.record.values["error"] == f"{text}; what is finished and the last checkpoint are kept"


def test_a_run_without_a_limit_and_one_that_ends_before_it_are_not_stopped(home: Path) -> None:
    opened = Home.open()
    for limit in ([], ["timeout_minutes=60"]):
        session = Session(build(load_recipe("sft_dpo", limit), opened), opened, LogView(lambda line: None))
        with session.timed():
            pass
        assert not session.timed_out
        session.stop.set()
        assert session.finish() == "cancelled"
