"""`preview` on a terminal, as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.cli.app import run_app
from tests.flows.test_artifacts_cli import ask

Capture = pytest.CaptureFixture[str]


def test_a_page_is_written_and_its_rows_are_those_of_the_json(folder: Path, capsys: Capture) -> None:
    answer = ask(capsys, "preview", "toy.json", "--rows", "3", "--html", "page.html")
    html = (folder / "page.html").read_text(encoding="utf-8")
    assert answer["html"] == "page.html"
    assert [set(row) & {"pieces", "step"} for row in answer["rows"]] == [set()] * 3
    assert html.count("<article") == 3
    assert html.count("<b title=") + html.count('" title="') == sum(len(row["input_ids"]) for row in answer["rows"])
    assert "3 texts; there are more" in html
    assert "html" not in ask(capsys, "preview", "toy.json", "--rows", "1")


def test_a_page_alone_says_where_it_is_and_takes_an_earlier_ones_place(folder: Path, capsys: Capture) -> None:
    for _ in range(2):
        assert run_app(["preview", "toy.json", "--html", "page.html"]) == 0
        assert capsys.readouterr().out == "page.html: 24 texts\n"
    assert (folder / "page.html").read_text(encoding="utf-8").count("<article") == 24


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        ("train.jsonl", "is there and is no such page. Remove it, or name another file."),
        (".", "is there and is no file"),
        ("nowhere/page.html", "there is no folder nowhere"),
    ],
)
def test_a_page_takes_the_place_of_nothing_else(folder: Path, capsys: Capture, target: str, rule: str) -> None:
    before = (folder / "train.jsonl").read_bytes()
    answer = ask(capsys, "preview", "toy.json", "--html", target, code=2)
    assert f"--html {target}" in answer["error"]
    assert rule in answer["error"]
    assert (folder / "train.jsonl").read_bytes() == before


def test_the_terminal_shows_five_rows_with_what_is_trained_between_brackets(folder: Path, capsys: Capture) -> None:
    rows = [{"instruction": f"q{n}", "output": "[bold]a[/bold]"} for n in range(4)] + [
        {"instruction": "q", "output": ""}
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    assert run_app(["preview", "toy.json", "--set", "stages.sft.bad_rows=skip"]) == 0
    out = capsys.readouterr().out
    assert out.count("⟦[bold]a[/bold]<|im_end|>⟧") == 4
    assert "refused: empty_output" in out
    assert out.count("15 trained") == 4
