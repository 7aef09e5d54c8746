"""How a form is found from a row, or read from a registry entry; what is said where it cannot give the shape."""

from __future__ import annotations

import pytest

from registry.errors import InputError
from tasks.formats import SHAPES, converter, declared, detect, misfit, unknown_columns
from tests.tasks.raw_rows import GOOD, HUMAN, PAIR, SYSTEM, TOOLS, Row, chat, gpt, rows, say


@pytest.mark.parametrize(
    ("row", "shape", "said"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "chat", "alpaca columns instruction, input, output"),
        ({"conversations": gpt("a", "b")}, "chat", "sharegpt column conversations"),
        ({"conversations": say("a", "b"), "tools": None}, "chat", "openai columns conversations, tools"),
        ({"chosen": HUMAN, "rejected": HUMAN}, "preference", "transcript columns chosen, rejected"),
        ({"messages": say("a", "b"), "label": True}, "labelled", "openai columns messages, label"),
        ({"text": "a"}, "text", "text column text"),
    ],
)
def test_detection_says_what_it_found(row: Row, shape: str, said: str) -> None:
    found = detect(row, shape)
    assert found is not None
    assert found.sentence() == said


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"question": "a"}, "chat"),
        ({"question": "a", "choices": ["x", "y"], "answer": 1}, "chat"),
        ({"question": "a", "choice0": "x", "answer": "0"}, "chat"),
        ({"instruction": "a", "output": "b"}, "preference"),
        ({"instruction": "a", "output": "b"}, "text"),
        ({"messages": say("a", "b")}, "text"),
        ({"messages": say("a", "b"), "label": 3}, "labelled"),
        ({"chosen": "The sky is blue", "rejected": "The sky is green"}, "preference"),
        ({"question": "a", "answer": ["b", "c"]}, "preference"),
        ({"text": "a"}, "chat"),
        ({"messages": []}, "chat"),
        ({"messages": None}, "chat"),
        ({}, "prompt"),
    ],
)
def test_nothing_is_found_where_columns_leave_a_choice_or_lack_what_is_needed(row: Row, shape: str) -> None:
    assert detect(row, shape) is None


def test_what_is_missing_is_said_with_the_columns_found() -> None:
    assert str(unknown_columns(["instruction", "output"], "preference", "a.json, row 0")) == (
        "a.json, row 0: the columns (instruction, output) are those of no known format of preference rows. "
        "A preference row (stages rm, dpo, orpo) needs a better and a worse answer: `chosen` and `rejected`, beside a "
        "prompt column, `conversations` or `messages`, or as whole conversations that begin alike. "
        "Name your own columns with `columns` in dataset_info."
    )
    alpaca = declared("alpaca", False, {}, {}, "chat")
    assert str(misfit(alpaca, "text", "mine")) == (
        "mine: alpaca columns instruction, output: questions with answers, which cannot be made into text rows. A text "
        "row (stage pt) needs a column of plain text, `text` or `content`; conversations are for stage sft."
    )
    with pytest.raises(InputError, match="cannot be made into preference rows"):
        converter(alpaca, "preference")
    assert misfit(alpaca, "chat") is None


def test_what_a_richer_source_is_cut_down_to_is_said() -> None:
    pair = declared("alpaca", True, {}, {}, "chat")
    assert [pair.change(shape) for shape in SHAPES[1:]] == [
        "the chosen answers are used",
        "",
        "each pair gives two rows, the chosen answer as true and the rejected one as false",
        "the chosen answer is the reference, everything before it the prompt",
    ]


def test_columns_that_the_first_row_lacks_are_read_in_later_rows() -> None:
    form = detect({"instruction": "a", "output": "b"}, "chat")
    later = {"instruction": "a", "input": "x", "output": "b", "system": "Be brief", "history": [["hi", "hello"]]}
    assert rows(later, "chat", form) == chat([*SYSTEM, *say("hi", "hello", "a\nx", "b")])
    form = detect({"messages": say("a", "b")}, "chat")
    assert rows({"messages": say("a", "b"), "system": "Be brief"}, "chat", form) == chat([*SYSTEM, *say("a", "b")])


def test_a_system_text_that_is_null_for_long_is_kept_when_it_comes() -> None:
    convert = converter(
        declared("alpaca", False, {"prompt": "q", "response": "a", "system": "system"}, {}, "chat"), "chat"
    )
    nulls = [convert({"q": "x" * 200, "a": "b", "system": None}) for _ in range(60)]
    assert nulls == [chat(say("x" * 200, "b"))] * 60
    assert convert({"q": "y", "a": "b", "system": "Be brief"}) == chat([*SYSTEM, *say("y", "b")])


DECLARED: dict[str, tuple[tuple[str, bool, Row, Row], str, Row, list[Row]]] = {
    "alpaca": (
        ("alpaca", False, {}, {}),
        "chat",
        {"instruction": "a", "input": "x", "output": "b"},
        chat(say("a\nx", "b")),
    ),
    "an input that is the prompt is not read twice": (
        ("alpaca", False, {"prompt": "input", "response": "target"}, {}),
        "chat",
        {"input": "a", "target": "b"},
        chat(say("a", "b")),
    ),
    "columns that are not named are not read": (
        ("alpaca", False, {"prompt": "instruction", "response": "output"}, {}),
        "chat",
        {"instruction": "a", "input": "x", "output": "b", "system": "s"},
        chat(say("a", "b")),
    ),
    "plain text by its prompt column": (
        ("alpaca", False, {"prompt": "body"}, {}),
        "text",
        {"body": "a"},
        [{"text": "a"}],
    ),
    "plain text": (("text", False, {"text": "body"}, {}), "text", {"body": "a"}, [{"text": "a"}]),
    "sharegpt with its own names": (
        (
            "sharegpt",
            False,
            {"messages": "talk", "system": "rule", "tools": "can"},
            {"role_tag": "who", "content_tag": "said", "user_tag": "customer", "assistant_tag": "clerk"},
        ),
        "chat",
        {"talk": [{"who": "customer", "said": "a"}, {"who": "clerk", "said": "b"}], "rule": "Be brief", "can": TOOLS},
        chat([*SYSTEM, *say("a", "b")], TOOLS),
    ),
    "pairs without ranking": (
        ("alpaca", False, {"prompt": "q", "chosen": "good", "rejected": "bad"}, {}),
        "preference",
        {"q": "a", "good": "b", "bad": "c"},
        [PAIR],
    ),
    "pairs by the stage": (
        ("sharegpt", False, {}, {}),
        "preference",
        {"conversations": gpt("a"), "chosen": gpt("", "b")[1], "rejected": gpt("", "c")[1]},
        [PAIR],
    ),
    "two answers in a list": (
        ("alpaca", True, {"prompt": "instruction", "response": "output"}, {}),
        "preference",
        {"instruction": "a", "output": ["b", "c"]},
        [PAIR],
    ),
    "labels": (
        (
            "sharegpt",
            False,
            {"messages": "messages", "kto_tag": "label"},
            {"role_tag": "role", "content_tag": "content"},
        ),
        "labelled",
        {"messages": say("a", "b"), "label": True},
        [GOOD],
    ),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_form_is_read_as_the_entry_says(name: str) -> None:
    (formatting, ranking, columns, tags), shape, row, expected = DECLARED[name]
    assert rows(row, shape, declared(formatting, ranking, columns, tags, shape)) == expected


def test_turns_in_an_alpaca_entry_are_named_with_the_formats_that_have_them() -> None:
    with pytest.raises(
        InputError, match=r"columns.messages: an alpaca row has no list of turns. Set formatting: share"
    ):
        declared("alpaca", False, {"messages": "conversations"}, {}, "chat")


def test_every_unknown_name_of_an_entry_is_named() -> None:
    with pytest.raises(InputError) as caught:
        declared("alpacca", False, {"promt": "a"}, {"role": "b"}, "chat")
    assert [(problem.where, problem.cure) for problem in caught.value.problems] == [
        ("formatting", "Did you mean alpaca?"),
        ("columns.promt", "Did you mean prompt?"),
        ("tags.role", "Did you mean role_tag?"),
    ]
