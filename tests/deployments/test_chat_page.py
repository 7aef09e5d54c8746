"""The chat page: what its buttons do, and that a vote given in a browser trains a model by dpo."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.chat.talks import CUT, STOPPED, Page, State
from deployments.chat.votes import count, keep, vote_rows
from tasks.chat_client import Client
from tests.deployments.browser import CHROMIUM, browser
from tests.flows.conftest import Server
from tests.flows.conftest import server as server
from tests.flows.twins import work_here
from tests.tasks.chat_servers import KEY, chat_model, serving
from tests.tiny import read_lines, tiny_model

HEY = {"role": "user", "content": "Hey 你好"}
NEVER = threading.Event()
GREEDY = {"temperature": 0, "top_p": 1, "top_k": 0, "max_new_tokens": 8, "repetition_penalty": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    names = ("one", "two", "three")
    with serving([chat_model(tiny_model(folder / n, seed), n) for seed, n in enumerate(names)], {}) as url:
        yield url


@pytest.fixture
def page(url: str, tmp_path: Path) -> Page:
    return Page(Client(url, KEY), ("one", "two", "three"), tmp_path / "kept" / "votes.jsonl")


def answered(page: Page, state: State, stop: threading.Event = NEVER, **settings: Any) -> list[State]:
    return list(page.answers(state, "", GREEDY | settings, stop))


def test_models_answer_side_by_side_and_the_talk_goes_on_from_the_best(page: Page) -> None:
    states = answered(page, page.asked(page.empty(), HEY["content"]))
    *before, last = states
    assert all(state.running and not state.comparable for state in before)
    assert (last.running, last.answered, last.comparable, last.said) == (False, True, True, HEY["content"])
    assert last.notes == (CUT,) * 3
    answers = [talk[-1]["content"] for talk in last.talks]
    assert len(set(answers)) == 3
    voted, rows = page.voted(last, 1, "Be brief.")
    assert (rows, voted.best, voted.comparable) == (2, 1, False)
    following = page.asked(voted, "More")
    assert (
        following.talks
        == (({**HEY}, {"role": "assistant", "content": answers[1]}, {"role": "user", "content": "More"}),) * 3
    )
    found = read_lines(page.votes)
    assert [(row["chosen_model"], row["rejected_model"]) for row in found] == [("two", "one"), ("two", "three")]
    assert found[0]["prompt"] == [{"role": "system", "content": "Be brief."}, HEY]
    assert found[1]["rejected"] == [{"role": "assistant", "content": answers[2]}]
    again = answered(page, page.asked(page.taken_back(following), "Other"))[-1]
    assert [message["content"] for message in again.talks[0][:-1]] == ["Hey 你好", answers[1], "Other"]


def test_without_a_vote_talks_part_and_later_answers_are_not_compared(page: Page) -> None:
    first = answered(page, page.asked(page.empty(), "Hey"))[-1]
    later = answered(page, page.asked(first, "More"))[-1]
    assert later.answered
    assert not later.comparable
    with pytest.raises(ValueError, match="have not been asked the same"):
        vote_rows(later.talks, page.models, 0, "")


def test_an_answer_that_is_stopped_stays_and_no_model_behind_it_begins(page: Page) -> None:
    stop, states = threading.Event(), list[State]()
    for state in page.answers(page.asked(page.empty(), "Hey"), "", GREEDY | {"max_new_tokens": 400}, stop):
        states.append(state)
        if len(state.talks[0]) == 2:
            stop.set()
    last = states[-1]
    assert last.notes == (STOPPED,) * 3
    assert [len(talk) for talk in last.talks] == [2, 1, 1]
    assert len(states) < 20
    assert not last.comparable


def test_what_the_server_refuses_is_shown_below_the_talk(page: Page) -> None:
    last = answered(page, page.asked(page.empty(), "Hey"), max_new_tokens=0)[-1]
    assert all(note.startswith("error: max_new_tokens: 0 should be") for note in last.notes)
    assert [len(talk) for talk in last.talks] == [1, 1, 1]


def test_equal_answers_are_no_pairs_and_a_broken_last_line_is_ended(tmp_path: Path) -> None:
    talks = [[HEY, {"role": "assistant", "content": said}] for said in ("a", "a", "b")]
    rows = vote_rows(talks, ("x", "y", "z"), 0, "")
    assert [(row["chosen_model"], row["rejected_model"]) for row in rows] == [("x", "z")]
    path = tmp_path / "votes.jsonl"
    path.write_text('{"cut')
    assert (keep(path, rows), count(path), keep(path, [])) == (2, 2, 2)
    assert json.loads(path.read_text().split("\n")[1]) == rows[0]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_vote_in_a_browser_is_trained_on_by_dpo(
    page: Page, folder: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import gradio

    from deployments.chat.page import make_page
    from flows.cli.app import run_app

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    blocks = make_page(page, {"max_new_tokens": 8}, "Be brief.")
    _, url, _ = blocks.launch(
        server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False
    )
    try:
        with browser(tmp_path / "profile") as tab:
            tab.call("Page.navigate", url=url)
            tab.wait("document.querySelector('textarea[placeholder=\"Your message\"]')")
            for text, vote, pairs in (("Hey 你好", "C best", 2), ("And <b>now</b>?", "A best", 4)):
                tab.run("document.querySelector('textarea[placeholder=\"Your message\"]').focus()")
                tab.type(text)
                tab.press("Send")
                tab.press(vote)  # as soon as all have answered
                tab.wait(f"document.querySelector('#votes').innerText.startsWith('{pairs} pairs')")
            assert tab.errors == []
            asked = {request.split("/")[2] for request in tab.requests if request.startswith(("http", "ws"))}
            assert asked == {url.split("/")[2]}  # nothing of the page comes from elsewhere
    finally:
        blocks.close()
    rows = read_lines(page.votes)
    assert [row["chosen_model"] for row in rows] == ["three", "three", "one", "one"]
    assert [message["content"] for message in rows[2]["prompt"]][::3] == ["Be brief.", "And <b>now</b>?"]
    assert gradio.__version__.startswith("6.")
    stage = {"stage": "dpo", "dataset": str(page.votes), "cutoff_len": 400, "max_steps": 2, "finetuning_type": "full"}
    recipe = {"name": "voted", "model_name_or_path": str(folder / "one"), "stages": {"dpo": stage}}
    recipe["evaluation"] = {"compare_with": "none"}
    (tmp_path / "voted.json").write_text(json.dumps(recipe))
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    work_here(monkeypatch)
    capsys.readouterr()
    assert run_app(["run", str(tmp_path / "voted.json"), "--json"]) == 0, capsys.readouterr().err
    steps = {step["step"]: Path(step["artifact"]) for step in json.loads(capsys.readouterr().out)["steps"]}
    assert json.loads((steps["tokenize"] / "manifest.json").read_text())["counts"]["rows"] == 4
    assert (steps["train"] / "model.safetensors").is_file()
