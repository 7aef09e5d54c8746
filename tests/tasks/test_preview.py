"""Rows by token: nothing of a text is lost or invented, and the page shows strangers' text as text.

The tiny tokenizer has one token per byte, so a character of three bytes has three tokens.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from registry.home import Home
from registry.loading import load_recipe
from tasks.digests import DigestMemory
from tasks.fetch import ROWS, fetch_step
from tasks.model import base_input
from tasks.preview import ADDED, CONTROL, NO_TOKEN, TYPED, SeenRow, TokenPiece, rows_seen
from tasks.preview_page import FIRST_LINE, StageRows, preview_page, visible
from tasks.reading import BadRow
from tasks.render import render_step
from tasks.shards import tokenize_step
from tasks.steps import Step
from tests.tasks.test_data_steps import make
from tests.tiny import tiny_model

END = 260
EVIL = "<script>alert(1)</script>&lt;b&gt;\"'<!--"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def seen(model: Path, data: Path, shape: str = "chat", **stage: Any) -> tuple[dict[str, Step], list[SeenRow]]:
    """Data steps for rows of a shape, and the rows by token."""
    own = {"stage": "sft", "dataset": [str(data)], "finetuning_type": "lora", **stage}
    settings = load_recipe({"name": "data", "model_name_or_path": str(model), "stages": {"one": own}}).stages[0]
    home, options = Home.open(), settings.data
    base, _ = base_input(str(model), "main", home)
    memory = DigestMemory(home.digests)
    fetch = fetch_step("one", "fetch", settings.sources, options, settings.runtime, shape, 0, memory, split=False)
    render = render_step("one", "render", fetch, ROWS, base, options, settings.template)
    tokenize = tokenize_step("one", "tokenize", render, base, options, packing=False)
    steps = {step.name: step for step in (fetch, render, tokenize)}
    return steps, list(rows_seen(tokenize, model, {}, by_token=True))


def chat(*turns: str) -> dict[str, Any]:
    """A conversation, the user first."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


CHATS = [
    chat("plain", "answer"),
    chat("你好，世界", "naïve café"),
    chat("🙂 and 👩‍👩‍👧", "e\u0301 \u200b\u202e\u00a0"),
    chat("say <|im_start|>system", "no <|im_end|>", "why?", EVIL),
    chat("lines\n\n\tand  spaces\r\n", " kept "),
    chat("long", "x" * 150),
]


@pytest.mark.parametrize(
    "settings", [{}, {"overlong": "truncate", "cut_answers": True}, {"mask_history": True}], ids=str
)
def test_pieces_join_to_the_text_and_their_ids_are_those_trained_on(
    model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    _, rows = seen(model, write(tmp_path, *CHATS), cutoff_len=160, bad_rows="skip", **settings)
    assert len(rows) == len(CHATS)
    used = [row for row in rows if row.refused is None]
    assert len(used) == len(CHATS) - ("overlong" not in settings)
    for row in used:
        assert "".join(piece.text for piece in row.pieces) == row.text
        assert [piece.token for piece in row.pieces if piece.token is not None] == row.input_ids
        assert sum(piece.trained for piece in row.pieces) == row.trained_tokens
        marks = [piece.trained for piece in row.pieces if piece.token is not None]
        assert marks == [label != -100 for label in row.labels or ()]


def test_typed_control_tokens_are_told_from_real_ones(model: Path, tmp_path: Path) -> None:
    _, (row,) = seen(model, write(tmp_path, chat("say <|im_end|>", "é")))
    typed = [piece for piece in row.pieces if piece.kind == TYPED]
    assert "".join(piece.text for piece in typed) == "<|im_end|>"
    assert bytes(piece.token or 0 for piece in typed) == b"<|im_end|>"
    assert [piece.text for piece in row.pieces if piece.kind == CONTROL] == ["<|im_start|>", "<|im_end|>"] * 2
    first, second = (piece for piece in row.pieces if piece.token in (0xC3, 0xA9))
    assert (first, second) == (TokenPiece("é", 0xC3, True), TokenPiece("", 0xA9, True))


def test_text_beyond_cutoff_len_has_no_token(model: Path, tmp_path: Path) -> None:
    _, (row,) = seen(model, write(tmp_path, chat("q", "abcdef")), cutoff_len=24, overlong="truncate", cut_answers=True)
    assert row.pieces[-2:] == (TokenPiece("d", 100, True), TokenPiece("ef<|im_end|>\n", None, False, NO_TOKEN))
    assert len(row.pieces) == 25


def test_the_end_of_a_document_is_added_and_its_first_token_is_never_predicted(model: Path, tmp_path: Path) -> None:
    steps, rows = seen(model, write(tmp_path, {"text": "ab"}, {"text": "é"}), shape="text")
    assert rows[0].pieces == (
        TokenPiece("a", 97, False),
        TokenPiece("b", 98, True),
        TokenPiece("", END, True, ADDED, "<|im_end|>"),
    )
    assert make(steps)["tokenize"].manifest["counts"]["trained_tokens"] == sum(row.trained_tokens for row in rows) == 4


def test_counts_are_those_of_the_tokenize_step(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path, *CHATS, chat("q", " "))
    steps, rows = seen(model, data, cutoff_len=160, bad_rows="skip")
    counts = make(steps)["tokenize"].manifest["counts"]
    used = [row for row in rows if row.refused is None]
    assert counts["rows"] == len(used) == 5
    assert counts["tokens"] == sum(len(row.input_ids or ()) for row in used)
    assert counts["trained_tokens"] == sum(row.trained_tokens for row in used)
    assert [(row.step, row.refused.reason) for row in rows if row.refused] == [
        ("tokenize", "too_long"),
        ("fetch", "empty_output"),
    ]
    assert counts["left_out"] == {"too_long": 1}


def test_a_pair_is_refused_as_a_whole_and_counts_once(model: Path, tmp_path: Path) -> None:
    pairs = [
        {"instruction": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "chosen": "good", "rejected": "b" * 200},
    ]
    steps, rows = seen(model, write(tmp_path, *pairs), shape="preference", bad_rows="skip", cutoff_len=100)
    assert [(row.part, row.refused is None, row.stands_for_row) for row in rows] == [
        ("chosen", True, True),
        ("rejected", True, False),
        ("chosen", False, True),
        ("rejected", False, False),
    ]
    counts = make(steps)["tokenize"].manifest["counts"]
    assert (counts["rows"], counts["left_out"]) == (1, {"too_long": 1})
    assert "1 row by tokenize: too_long" in page(rows).replace("<i> </i>", " ")


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text inside `pre`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[str] = []
        self._inside = self._sign = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._sign = tag == "u" and ("class", "w") in attrs
        if tag == "pre":
            self._inside = True
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "pre"
        self._sign = False

    def handle_data(self, data: str) -> None:
        if self._inside and not self._sign:
            self.blocks[-1] += data


def page(rows: list[SeenRow], more: bool = False) -> str:
    return preview_page("demo", [StageRows("one", rows, more)])


def test_the_page_shows_every_text_as_it_is_and_asks_for_nothing(model: Path, tmp_path: Path) -> None:
    _, rows = seen(model, write(tmp_path, *CHATS), cutoff_len=400)
    html = page(rows)
    found = Page(html)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "svg", "video"}
    assert not [attrs for _, attrs in found.elements if set(attrs) & {"src", "style", "onclick", "onload"}]
    assert [a["href"] for tag, a in found.elements if tag == "a"] == []
    assert "url(" not in html
    assert "default-src 'none'" in html
    shown = [re.sub(r"U\+([0-9A-F]{4,6})", lambda m: chr(int(m[1], 16)), text) for text in found.blocks]
    assert shown == [row.text for row in rows]
    tokens = [attrs["title"] for tag, attrs in found.elements if tag == "b" and "title" in attrs]
    assert tokens == [str(token) for row in rows for token in row.input_ids or ()]


def test_every_place_where_a_strangers_text_can_stand_is_escaped() -> None:
    bad = SeenRow(f"{EVIL}.jsonl", 0, EVIL, refused=BadRow(EVIL, EVIL), step="fetch")
    good = SeenRow(EVIL, 1, EVIL, EVIL, EVIL, [], [1], [-100], lost=(EVIL,), pieces=(TokenPiece(EVIL, 1, False),))
    added = SeenRow("f", 2, "p", text="", input_ids=[1], lost=(EVIL,), pieces=(TokenPiece("", 1, True, ADDED, EVIL),))
    html = preview_page(EVIL, [StageRows(EVIL, [bad, good, added], True)])
    assert "<script" not in html
    assert "<!--" not in html
    assert "script" not in {tag for tag, _ in Page(html).elements}
    assert html.startswith(FIRST_LINE)


def test_the_summary_counts_and_links_refused_rows(model: Path, tmp_path: Path) -> None:
    _, rows = seen(model, write(tmp_path, *CHATS, chat("q", " ")), cutoff_len=160, bad_rows="skip")
    html = page(rows, more=True)
    tokens, trained = sum(len(row.input_ids or ()) for row in rows), sum(row.trained_tokens for row in rows)
    assert f"5 texts: {tokens} tokens, {trained} trained" in html
    assert "7 texts; there are more" in html
    links = [attrs["href"] for tag, attrs in Page(html).elements if tag == "a"]
    ids = [attrs["id"] for tag, attrs in Page(html).elements if tag == "article"]
    assert links == [f"#{ids[5]}", f"#{ids[6]}"]


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\n") == 'a<u class="w">↵</u>\n'
    assert visible("\u202e\r\udc80") == "".join(f'<u class="h">U+{n}</u>' for n in ("202E", "000D", "DC80"))
    assert visible("👩\u200d👩") == "👩\u200d👩"
