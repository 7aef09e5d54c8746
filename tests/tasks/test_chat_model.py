"""A model in a chat reads and writes what it does in the step `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from registry.evaluation_records import GenerationSettings
from tasks.chat_model import ChatModel, TooLong
from tasks.generate_program import work
from tasks.program import Events, Spec
from tasks.sequences import TokenizedRows
from tests.tasks.chat_servers import chat_model
from tests.tasks.test_generate_program import SETTINGS, data_steps, make, write
from tests.tiny import read_lines, tiny_model, write_spec

ROWS = [
    {"instruction": "Who is there?", "output": "Nobody."},
    {"instruction": "你好 🙂, is <|im_end|> typed?", "output": "Yes."},
    {"instruction": "And then?", "history": [["Hi", "Hello."], ["Bye", "No."]], "system": "Be brief.", "output": "x"},
]
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Who is there?"}],
    [{"role": "user", "content": [{"type": "text", "text": "你好 🙂, is <|im_end|> typed?"}]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "And then?"},
    ],
]
END, START = 260, 259
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
DROPS += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
TOOL = {"type": "function", "function": {"name": "f", "description": "adds", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return chat_model(folder)


def test_prompts_and_greedy_answers_are_those_of_the_step_generate(
    folder: Path, model: ChatModel, tmp_path: Path
) -> None:
    prompts = make(data_steps(folder, write(tmp_path / "rows.jsonl", *ROWS)))[0].artifact.path
    inputs, runtime = {"model": folder, "set.0": prompts}, {"set_names": ["held_out"]}
    spec = Spec.read(write_spec(tmp_path / "generate", SETTINGS | {"per_device_eval_batch_size": 2}, inputs, runtime))
    work(spec, Events(spec.events))
    rows = TokenizedRows(prompts)
    ids = [rows.piece(row, 0, int(length))[0].tolist() for row, length in enumerate(rows.lengths())]
    assert [model.prompt(talk) for talk in TALKS] == ids
    assert ids[1].count(END) == 1  # the typed one is text
    settings = GenerationSettings(max_new_tokens=6)
    answers = [model.answer(model.prompt(talk), settings) for talk in TALKS]
    lines = read_lines(Path(spec.output) / "answers.jsonl")
    assert [(a.text, a.tokens, a.stopped) for a in answers] == [
        (line["answer"], line["tokens"], line["stopped"]) for line in lines
    ]
    assert len({line["answer"] for line in lines}) == 3


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "seed": 3},
        {"num_beams": 3},
        {"repetition_penalty": 1.4},
    ],
)
def test_the_parts_of_an_answer_are_the_answer(model: ChatModel, given: dict[str, Any]) -> None:
    parts: list[str] = []
    settings = GenerationSettings(max_new_tokens=40, **given)
    answer = model.answer(model.prompt(TALKS[0]), settings, tell=parts.append)
    assert "".join(parts) == answer.text == model.answer(model.prompt(TALKS[0]), settings).text
    assert (len([part for part in parts if part]) > 3) == ("num_beams" not in given)


def test_a_stop_word_ends_an_answer_and_counts_as_an_end(model: ChatModel) -> None:
    prompt, settings = model.prompt(TALKS[0]), GenerationSettings(max_new_tokens=30)
    free = model.answer(prompt, settings)
    assert not free.stopped
    word = free.text[6:9]
    found = model.answer(prompt, settings, [word])
    assert found.text == free.text[: free.text.index(word)]
    assert found.stopped
    assert found.tokens < free.tokens


def test_an_answer_that_nobody_wants_ends_at_the_next_token(model: ChatModel) -> None:
    parts: list[str] = []
    settings = GenerationSettings(max_new_tokens=100)
    answer = model.answer(model.prompt(TALKS[0]), settings, tell=parts.append, unwanted=lambda: len(parts) == 3)
    assert (answer.tokens, answer.stopped) == (3, False)


def test_an_answer_ends_where_the_model_sees_no_further(model: ChatModel) -> None:
    assert model.longest == 512
    prompt = model.prompt([{"role": "user", "content": "x" * 480}])
    answer = model.answer(prompt, GenerationSettings(max_new_tokens=1000))
    assert len(prompt) + answer.tokens == 512
    with pytest.raises(TooLong, match="is 519 tokens long, and the model can see 512"):
        model.prompt([{"role": "user", "content": "x" * 500}])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "is not a list of messages"),
        ([{"role": "user"}], r"messages\[0\].content is missing or null"),
        ([{"role": "usr", "content": "x"}], "'usr'; known: user"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "the last message is the assist"),
        ([{"role": "user", "content": "x"}] * 2, "user follows user"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "of type 'image_url'"),
    ],
)
def test_what_is_no_conversation_is_refused(model: ChatModel, messages: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        model.prompt(messages)


def test_what_a_template_would_drop_is_refused_and_what_it_writes_is_not(folder: Path, model: ChatModel) -> None:
    with pytest.raises(InputError, match="writes no tools"):
        model.prompt(TALKS[0], [TOOL])
    with pytest.raises(InputError, match="drops the system message"):
        chat_model(folder, template=DROPS).prompt(TALKS[2])
    ids = chat_model(folder, template=WITH_TOOLS + DROPS).prompt(TALKS[0], [TOOL])
    assert bytes(token for token in ids if token < 256).startswith(b'[{"type": "function", "function": {"name": "f"')


def test_a_model_without_a_template_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    bare = tiny_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    (bare / "model.safetensors").unlink()  # loading would fail in another way
    with pytest.raises(InputError, match="the model has no chat template"):
        chat_model(bare)
