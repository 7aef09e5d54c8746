"""Bad rows, data set entries and templates are named by file and line before anything starts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from flows.graph import build
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Store
from tasks.digests import DigestMemory
from tasks.steps import do
from tests.flows.refusals import nothing_begun, refusal, write_lines

GOOD = {"instruction": "say hi", "output": "hi"}
UPPER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


ROWS: list[tuple[str, bytes, list[str]]] = [
    ("empty file", b"", ["stages.sft.dataset: the file /", "train.jsonl is empty. A data set needs at least one row."]),
    ("blank lines", b"\n\r\n  \n", ["train.jsonl: no usable row: the files hold no rows"]),
    ("empty array", b"[]", ["train.jsonl: no usable row: the files hold no rows"]),
    ("array of numbers", b"[1, 2]", ["train.jsonl, row 0: a row is a JSON object, this is int [not_an_object]"]),
    ("torn array", b'[{"instruction": "a",\n "output"', ["train.jsonl:2: not valid JSON: Expecting"]),
    ("array not UTF-8", b'[{"a": "\xff"}]', ["train.jsonl: not UTF-8 text at byte 8. Save the file as UTF-8."]),
    ("nested array", b"[" * 100_000, ["train.jsonl", "not readable JSON: maximum recursion depth"]),
    (
        "torn line",
        b'{"instruction": "a", "output": "b"}\n{"instru\n',
        ["train.jsonl, line 2: not valid JSON", "bad_rows"],
    ),
    ("nested line", b'{"a":' * 100_000, ["train.jsonl, line 1: not valid JSON (maximum recursion depth"]),
    ("line not UTF-8", b'{"instruction": "\xe4", "output": "b"}\n', ["line 1: byte 17 of the line is not UTF-8"]),
    ("half a character", b'{"instruction": "a", "output": "\\ud83d"}', ["line 1: half of a surrogate pair"]),
    ("no answer", b'{"instruction": "a", "output": " "}', ["line 1: 'output' is empty: a row without an answer"]),
    ("null answer", b'{"instruction": "a", "output": null}', ["line 1: 'output' is null [null_field]"]),
    ("answer missing", b'{"instruction": "a"}', ["line 1: the columns (instruction) are those of no known format"]),
    ("answer as list", b'{"instruction": "a", "output": ["b"]}', ["line 1: 'output' is list, not text [wrong_type]"]),
    ("asks only", b'{"messages": [{"role": "user", "content": "a"}]}', ["line 1: the conversation ends with user"]),
    ("role as list", b'{"messages": [{"role": ["user"], "content": "a"}]}', ["messages[0].role is ['user']; known"]),
    ("calls as text", b'{"messages": [{"role": "user", "tool_calls": "x"}]}', ["messages[0].tool_calls is not a list"]),
    (
        "tools as text",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "[1]"}',
        ["line 1: 'tools' is not a list of objects"],
    ),
    ("history as text", b'{"instruction": "a", "output": "b", "history": "c"}', ["'history' is not a list of [quest"]),
]


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(("content", "said"), [pytest.param(*case[1:], id=case[0]) for case in ROWS])
def test_bad_rows_are_found_before_anything_starts(
    folder: Path, home: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: list[str], command: str
) -> None:
    (folder / "train.jsonl").write_bytes(content)
    text = refusal(capsys, command, "toy.json")
    for piece in said:
        assert piece in text
    assert nothing_begun(home)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{file_name: train.jsonl, columns: [a]}", "mine.columns: ['a'] is not a mapping of names to names"),
        ("{file_name: train.jsonl, tags: null}", "mine.tags: None is not a mapping"),
        ("{file_name: train.jsonl, num_samples: few}", "mine.num_samples: 'few' is not a number of rows"),
        ("{file_name: train.jsonl, formating: alpaca}", "mine.formating: unknown key. Did you mean formatting"),
        ("{file_name: train.jsonl, formatting: [x]}", "mine.formatting: unknown format ['x']"),
        ("{file_name: ../model}", "model holds no data file (.json"),
        ("{file_name: model.csv}", "model.csv does not exist"),
        ("{hf_hub_url: a b}", "mine.hf_hub_url: 'a b' is not a hub id. It is owner/name."),
        ("{script_url: a.py}", "mine.script_url: a dataset script is a program that would run here"),
        ("{file_name: train.jsonl, columns: {images: x}}", "mine.columns.images: images are data of other kinds than"),
        ("[1]", "mine: [1] is not an entry"),
        ("\xff", "dataset_info.yaml: not UTF-8 text"),
        ("[", "dataset_info.yaml:2: not valid YAML or JSON"),
    ],
)
def test_a_bad_dataset_info_is_named(folder: Path, capsys: pytest.CaptureFixture[str], entry: str, said: str) -> None:
    (folder / "info").mkdir()
    (folder / "info" / "dataset_info.yaml").write_text(f"mine: {entry}\n", encoding="latin-1")
    settings = ["--set", "stages.sft.dataset=mine", "--set", "stages.sft.dataset_dir=info"]
    assert said in refusal(capsys, "check", "toy.json", *settings)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (UPPER, "error: chat template: no row can be trained on with it: in a probe conversation the template changes"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "chat template:1: the chat template does not compile: maximum rec"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion depth exceeded"),
        ("{% for m in messages %}", "chat template:1: the chat template does not compile"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[99].content }}", "no row can be trained on with it"),
        ("no content", "changes, drops or repeats a message [mask_not_proved]. Use another one"),
        ("\xff", "not UTF-8 text"),
    ],
)
def test_a_template_that_cannot_be_used_is_found_before_anything_starts(
    folder: Path, home: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    (folder / "mine.jinja").write_text(content, encoding="latin-1")
    assert said in refusal(capsys, "run", "toy.json", "--set", "stages.sft.template=mine.jinja")
    assert nothing_begun(home)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer: "),
        ("tokenizer.json", b'"added_tokens": [', "tokenizer.json: is not JSON"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: is not a JSON object but list"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "tokenizer_config.json: 5 is not a special token"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json: not UTF-8 text at byte 0"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8 text at byte 0"),
        ("chat_template.jinja", None, "the model has no chat template. Choose one with `template:`, e.g. chatml"),
        ("config.json", None, "not a whole model: config.json not there. Copy the whole model."),
    ],
)
def test_a_damaged_model_folder_is_named(
    folder: Path, home: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, said: str
) -> None:
    (folder / "model" / name).unlink()
    if content is not None:
        (folder / "model" / name).write_bytes(content)
    assert said in refusal(capsys, "check", "toy.json")
    assert nothing_begun(home)


def test_rows_that_are_all_too_long_are_found_by_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, "check", "toy.json", "--set", "stages.sft.cutoff_len=16")
    assert "train.jsonl, line 1: 36 tokens, cutoff_len is 16" in text
    assert "cutoff_len: none of 24 rows can be used. Raise cutoff_len, or set overlong: truncate" in text


def make_data(recipe: Path, *settings: str) -> list[str]:
    """Make the data steps of a recipe without a server; the kinds made."""
    home = Home.open()
    steps = build(load_recipe(str(recipe), settings), home).data_only().steps
    store, memory = Store(home), DigestMemory(home.digests)
    return [step.title for step in steps if do(step, store, memory, threading.Event(), lambda _: None).state == "ran"]


def test_mended_rows_are_used_and_the_failed_step_left_nothing(folder: Path, home: Path) -> None:
    write_lines(folder / "train.jsonl", GOOD, {"instruction": "a", "output": ""})
    with pytest.raises(InputError, match="line 2"):
        make_data(folder / "toy.json")
    assert list((home / "artifacts").glob("*/*")) == []
    write_lines(folder / "train.jsonl", GOOD, GOOD)
    assert make_data(folder / "toy.json")[:3] == ["sft/fetch", "sft/render", "sft/tokenize"]
    counts = [a.manifest["counts"] for a in Store(Home.open()).all() if a.step == "tokenize"]
    assert sorted(count["rows"] for count in counts) == [2, 6]


def test_a_mended_template_is_used_and_the_failed_step_left_nothing(folder: Path, home: Path) -> None:
    (folder / "mine.jinja").write_text(UPPER)
    with pytest.raises(InputError, match="use another template"):
        make_data(folder / "toy.json", "stages.sft.template=mine.jinja")
    assert not (home / "artifacts" / "render").exists()
    (folder / "mine.jinja").write_text(UPPER.replace(" | upper", ""))
    assert make_data(folder / "toy.json", "stages.sft.template=mine.jinja")[0] == "sft/render"
