"""An answer given out in parts: characters are whole, stop words never shown, and the parts are the answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tasks.answer_text import AnswerText


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def parts(text: AnswerText, said: bytes) -> list[str]:
    """What is given out as the bytes come one by one, up to a stop word or the end."""
    found = []
    for size in range(1, len(said) + 1):
        found.append(text.grow(said[:size]))
        if text.stopped:
            return found
    return [*found, text.finish(said)]


@pytest.mark.parametrize("said", ["plain", "héllo, 你好! 👩‍👩‍👧 done", "🙂", "", "ends with 中"])
def test_no_character_is_cut_and_the_parts_are_the_answer(said: str) -> None:
    found = parts(AnswerText(decode), said.encode())
    assert "".join(found) == said
    assert not any("\ufffd" in part for part in found)
    assert [part for part in found if part] == list(said)


def test_an_answer_that_ends_inside_a_character_ends_as_the_decoder_says() -> None:
    said = "中".encode()[:2]
    assert parts(AnswerText(decode), b"ok " + said) == ["o", "k", " ", "", "", decode(said)]


@pytest.mark.parametrize(
    ("said", "stop", "told"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aab", ["ab"], "a"),
        ("<|user", ["<|user|>"], "<|user"),
        ("<|user|>", ["<|user|>"], ""),
        ("好的。停!", ["停"], "好的。"),
        ("no such word", ["word!"], "no such word"),
    ],
)
def test_a_stop_word_ends_the_answer_and_no_letter_of_it_is_shown(said: str, stop: list[str], told: str) -> None:
    text = AnswerText(decode, stop)
    assert "".join(parts(text, said.encode())) == text.told == told
    assert text.stopped == any(word in said for word in stop)


def test_what_may_become_a_stop_word_waits_until_it_is_none() -> None:
    assert parts(AnswerText(decode, ["END"]), b"a ENTER") == ["a", " ", "", "", "ENT", "", "ER", ""]


def test_bytes_that_spoil_those_before_them_take_nothing_back() -> None:
    spoiled = AnswerText(lambda ids: "\ufffd" * len(ids) if len(ids) == 2 else "a" * len(ids))
    assert [spoiled.grow([0]), spoiled.grow([0, 0]), spoiled.finish([0, 0]), spoiled.told] == ["a", "", "", "a"]
