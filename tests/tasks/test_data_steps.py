"""fetch, render and tokenize on a tiny model: no row is lost without a word, and labels are exactly the answers.

The tiny tokenizer has one token per byte, so ids are bytes: `<s>` is 257, `<|im_start|>` 259, `<|im_end|>` 260.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.graph import build
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Artifact, Store
from tasks.canonical import read_table, to_rows
from tasks.digests import DigestMemory
from tasks.locks import Interrupted
from tasks.sequences import TokenizedSequences
from tasks.steps import Step, do
from tests.tiny import CHAT_TEMPLATE, read_lines, tiny_model

START, END = 259, 260
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def question(text: str, answer: str) -> dict[str, str]:
    return {"instruction": text, "output": answer}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def steps_of(model: Path, data: Path | list[Any], **stage: Any) -> dict[str, Step]:
    """The data steps by name."""
    given = data if isinstance(data, list) else [data]
    files = [str(path) if isinstance(path, Path) else path for path in given]
    own = {"stage": "sft", "dataset": files, "finetuning_type": "lora", **stage}
    recipe = load_recipe({"name": "data", "model_name_or_path": str(model), "stages": {"sft": own}})
    return {step.name: step for step in build(recipe, Home.open()).data_only().steps}


def make(steps: dict[str, Step], emit: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Artifact]:
    """Do all steps; their artifacts by name."""
    store = Store(Home.open())
    memory, stop = DigestMemory(store.home.digests), threading.Event()
    return {name: do(step, store, memory, stop, emit).artifact for name, step in steps.items()}


def rows_of(artifact: Artifact, part: str = "rows") -> Rows:
    """What a fetch step wrote, with the number of the data set as `source`."""
    entries = json.loads((artifact.path / f"{part}.json").read_text())
    return [
        row | {"source": entry["source"]}
        for entry in entries
        for row in to_rows(read_table(artifact.path / entry["path"]), "chat")
    ]


def sequences(artifact: Artifact) -> Rows:
    """The sequences a tokenize step wrote, with the numbers of their rows as `datasets` reads them."""
    from datasets import load_from_disk

    saved, found = load_from_disk(str(artifact.path)), TokenizedSequences(artifact.path)
    numbers = list(saved["row"])
    return [
        {name: values.tolist() for name, values in found[index]._asdict().items()}
        | {"rows": [numbers[row] for row in found.rows_of(index)]}
        for index in range(len(found))
    ]


def answers(row: dict[str, Any]) -> list[str]:
    """The trained stretches of a row as text, `<|im_end|>` shown as `∎`."""
    found: list[bytes] = [b""]
    for label in row["labels"]:
        if label == -100:
            found.append(b"")
        else:
            found[-1] += "∎".encode() if label == END else bytes([label])
    return [part.decode() for part in found if part]


def test_rows_in_are_rows_out_and_rows_reported_at_every_step(model: Path, tmp_path: Path) -> None:
    data = write(
        tmp_path / "rows.jsonl",
        question("a", "b"),
        '{"instruction": "torn',
        question("c", " "),
        question("say <|im_start|>", "d"),
        question("e", "f" * 200),
        question("g", "h"),
    )
    made = make(steps_of(model, data, bad_rows="skip", cutoff_len=100, control_tokens="refuse"))
    counts = {name: artifact.manifest["counts"] for name, artifact in made.items()}
    assert counts["fetch"] == {"rows_read": 6, "rows": 4, "left_out": {"empty_output": 1, "malformed_json": 1}}
    assert counts["render"] == {"rows": 3, "left_out": {"control_text": 1}, "lost": {}}
    assert (counts["tokenize"]["rows"], counts["tokenize"]["rows_read"]) == (2, 3)
    assert counts["tokenize"]["left_out"] == {"too_long": 1}
    reported = {name: read_lines(artifact.path / "report" / "rejected.jsonl") for name, artifact in made.items()}
    assert [(row["place"], row["row"], row["reason"]) for row in reported["fetch"]] == [
        ("line 2", 1, "malformed_json"),
        ("line 3", 2, "empty_output"),
    ]
    assert [(row["place"], row["row"]) for row in reported["render"]] == [("line 4", 3)]
    assert [(row["place"], row["detail"]) for row in reported["tokenize"]] == [
        ("line 5", "222 tokens, cutoff_len is 100")
    ]
    assert {row["file"] for rows in reported.values() for row in rows} == {str(data)}
    assert [row["rows"] for row in sequences(made["tokenize"])] == [[0], [5]]


@pytest.mark.parametrize(("val_size", "count"), [(0.25, 5), (3, 3), (0.99, 19)])
def test_val_size_keeps_rows_back_that_are_not_trained_on(
    model: Path, tmp_path: Path, val_size: float, count: int
) -> None:
    data = write(tmp_path / "rows.jsonl", *[question(f"q{n}", f"a{n}") for n in range(20)])
    if count == 19:
        with pytest.raises(InputError, match=r"val_size 0.99 keeps back 20 of 20 rows. At least one row on either"):
            make(steps_of(model, data, val_size=val_size))
        return
    made = make(steps_of(model, data, val_size=val_size))
    kept_back = {row["row"] for row in rows_of(made["fetch"], "kept_back")}
    trained = {row["row"] for row in rows_of(made["fetch"])}
    assert len(kept_back) == count
    assert kept_back | trained == set(range(20))
    assert not kept_back & trained
    assert {row["rows"][0] for row in sequences(made["tokenize:validation"])} == kept_back
    assert {row["rows"][0] for row in sequences(made["tokenize"])} == trained
    shutil.rmtree(made["fetch"].path)
    assert make(steps_of(model, data, val_size=val_size))["fetch"].digest == made["fetch"].digest
    other = make(steps_of(model, data, val_size=val_size, seed=1))
    assert {row["row"] for row in rows_of(other["fetch"], "kept_back")} != kept_back


def test_max_samples_takes_the_first_rows_of_each_data_set(model: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", *[question(f"{name}{n}", "x") for n in range(9)]) for name in "ab"]
    made = make(steps_of(model, files, max_samples=2))
    found = [(row["source"], row["row"], row["messages"][0]["content"]) for row in rows_of(made["fetch"])]
    assert found == [(0, 0, "a0"), (0, 1, "a1"), (1, 0, "b0"), (1, 1, "b1")]


CHAT = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]


@pytest.mark.parametrize(("mask_history", "trained"), [(False, ["a1∎", "a2∎"]), (True, ["a2∎"])])
def test_mask_history_trains_the_last_answer_only(
    model: Path, tmp_path: Path, mask_history: bool, trained: list[str]
) -> None:
    row = {"messages": [{"role": role, "content": content} for role, content in CHAT]}
    made = make(steps_of(model, write(tmp_path / "rows.jsonl", row), mask_history=mask_history))
    assert answers(sequences(made["tokenize"])[0]) == trained


def test_ids_and_labels_of_a_row_are_exactly_these(model: Path, tmp_path: Path) -> None:
    made = make(steps_of(model, write(tmp_path / "rows.jsonl", question("hi", "é!"))))
    assert sequences(made["tokenize"]) == [
        {
            # <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\né!<|im_end|>\n
            "input_ids": [START, *b"user\nhi", END, 10, START, *b"assistant\n", 0xC3, 0xA9, 33, END, 10],
            "labels": [-100] * 21 + [0xC3, 0xA9, 33, END, -100],
            "seq_lengths": [26],
            "rows": [0],
        }
    ]


TEXTS = ["plain", "naïve café", "你好，世界", "🙂 and 👩‍👩‍👧", "  spaces around  ", "two\n\nlines", "ends in é"]


@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>"])
def test_labels_are_the_answers_and_their_terminator_also_when_pad_is_eos(
    model: Path, tmp_path: Path, pad: str
) -> None:
    changed = changed_model(model, tmp_path, pad_token=pad)
    data = write(tmp_path / "rows.jsonl", *[question(f"{text}?", text) for text in TEXTS])
    made = make(steps_of(changed, data))
    found = [answers(row) for row in sequences(made["tokenize"])]
    assert found == [[f"{text}∎"] for text in TEXTS]
    counts = made["tokenize"].manifest["counts"]
    assert counts["trained_tokens"] == sum(len(text.encode()) + 1 for text in TEXTS)


@pytest.mark.parametrize(
    ("overlong", "lengths", "truncated", "left_out"),
    [
        ("drop", [30], 0, {"too_long": 1}),
        ("truncate", [30], 0, {"no_trained_tokens": 1}),
        ("truncate, cut_answers", [30, 40], 1, {}),
        ("error", None, 0, {}),
    ],
)
def test_overlong_rows_are_dropped_cut_or_refused(
    model: Path, tmp_path: Path, overlong: str, lengths: list[int] | None, truncated: int, left_out: dict[str, int]
) -> None:
    data = write(tmp_path / "rows.jsonl", question("a", "b" * 8), question("a", "c" * 30))
    policy, _, cut_answers = overlong.partition(", ")
    steps = steps_of(model, data, overlong=policy, cutoff_len=40, cut_answers=bool(cut_answers))
    if lengths is None:
        with pytest.raises(InputError, match=r"line 2: 52 tokens, cutoff_len is 40 \[too_long\]"):
            make(steps)
        assert list(Home.open().artifacts.glob("tokenize/*")) == []
        return
    made = make(steps)["tokenize"]
    assert [len(row["input_ids"]) for row in sequences(made)] == lengths
    counts = made.manifest["counts"]
    assert (counts["truncated"], counts["left_out"], counts["rows_read"]) == (truncated, left_out, 2)
    assert (counts["longest"], counts["tokens"]) == (lengths[-1], sum(lengths))
    if cut_answers:
        assert answers(sequences(made)[1]) == ["c" * 20]  # cut at the end: no terminator is left


def test_a_row_is_cut_behind_the_last_answer_that_fits_so_that_no_answer_loses_its_terminator(
    model: Path, tmp_path: Path
) -> None:
    row = {"messages": [{"role": role, "content": content} for role, content in [*CHAT, ("user", "q3")]]}
    row["messages"].append({"role": "assistant", "content": "x" * 50})
    made = make(steps_of(model, write(tmp_path / "rows.jsonl", row), overlong="truncate", cutoff_len=100))
    (found,) = sequences(made["tokenize"])
    assert answers(found) == ["a1∎", "a2∎"]
    assert found["input_ids"][-1] == END


def test_a_row_cut_before_its_answer_is_left_out(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", question("a" * 40, "b"), question("a", "b"))
    made = make(steps_of(model, data, overlong="truncate", cutoff_len=40))["tokenize"]
    assert made.manifest["counts"]["left_out"] == {"no_trained_tokens": 1}
    assert [row["rows"] for row in sequences(made)] == [[1]]


def test_packing_keeps_every_row_once_and_as_it_was(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *[question(f"q{n}", "x" * (1 + n * 7 % 23)) for n in range(1, 31)])
    alone = {tuple(row["rows"]): row for row in sequences(make(steps_of(model, data))["tokenize"])}
    made = make(steps_of(model, data, packing=True, cutoff_len=120))["tokenize"]
    found = []
    for pack in sequences(made):
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) == len(pack["labels"]) <= 120
        begin = 0
        for row, length in zip(pack["rows"], pack["seq_lengths"], strict=True):
            own = alone[(row,)]
            assert pack["input_ids"][begin : begin + length] == own["input_ids"]
            assert pack["labels"][begin : begin + length] == own["labels"]
            begin += length
            found.append(row)
    assert sorted(found) == list(range(30))
    counts = made.manifest["counts"]
    assert counts["sequences"] < counts["rows"] == 30
    assert counts["filled"] == round(counts["tokens"] / (counts["sequences"] * 120), 4)


def changed_model(model: Path, tmp_path: Path, **config: Any) -> Path:
    """The tiny model with entries of tokenizer_config.json changed; `adds_bos` makes its tokenizer put one in front."""
    folder = Path(shutil.copytree(model, tmp_path / "changed"))
    if config.pop("adds_bos", False):
        from tokenizers import Tokenizer, processors

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 257)])
        tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
def test_there_is_exactly_one_bos_and_it_is_not_trained(
    model: Path, tmp_path: Path, adds_bos: bool, writes_bos: bool
) -> None:
    changed = changed_model(model, tmp_path, adds_bos=adds_bos)
    (tmp_path / "own.jinja").write_text("{{ bos_token }}" * writes_bos + CHAT_TEMPLATE)
    data = write(tmp_path / "rows.jsonl", question("hi", "ok"))
    made = make(steps_of(changed, data, template=str(tmp_path / "own.jinja")))
    row = sequences(made["tokenize"])[0]
    wanted = 1 if adds_bos or writes_bos else 0
    assert row["input_ids"][: wanted + 1] == [257] * wanted + [START]
    assert row["input_ids"].count(257) == wanted
    assert (row["labels"][0], answers(row)) == (-100, ["ok∎"])
    assert row["seq_lengths"] == [len(row["input_ids"])] == [26 - 1 + wanted]


@pytest.mark.parametrize("kind", ["render", "tokenize"])
def test_an_interrupted_step_goes_on_and_gives_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data = write(tmp_path / "rows.jsonl", *[question(f"q{n}", f"a{n}") for n in range(2100)])  # two chunks
    steps = steps_of(model, data)
    before = {name: step for name, step in steps.items() if name == "fetch" or name == "render" != kind}
    make(before)
    store, stop = Store(Home.open()), threading.Event()
    memory = DigestMemory(store.home.digests)

    def stop_behind_the_first_chunk(event: dict[str, Any]) -> None:
        if event.get("step") == 2000:
            stop.set()

    with pytest.raises(Interrupted):
        do(steps[kind], store, memory, stop, stop_behind_the_first_chunk)
    assert list(store.home.artifacts.glob(f"{kind}/*")) == []
    seen: list[int] = []
    again = do(steps[kind], store, memory, threading.Event(), lambda event: seen.append(event.get("step", -1)))
    assert not any(0 < step < 2000 for step in seen)  # the first chunk is not made twice
    monkeypatch.setenv("LLAMATUNER_HOME", str(tmp_path / "other_home"))
    assert make(steps)[kind].digest == again.artifact.digest


def test_a_mixture_repeats_rows_without_writing_them_twice(model: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", *[question(f"q{n}", "a") for n in range(3)])
    two = write(tmp_path / "two.jsonl", question("r", "b"))
    wanted = [{"file_name": str(one), "max_rows": 2}, {"file_name": str(two), "repeat": 3}]
    made = make(steps_of(model, wanted))["tokenize"]
    assert [answers(row)[0] for row in sequences(made)] == ["a∎", "a∎", "b∎", "b∎", "b∎"]
    counts = made.manifest["counts"]
    assert (counts["rows"], counts["sequences"]) == (3, 5)


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [("[2:5]", [2, 3, 4]), ("[:20%]", [0, 1]), ("[-3:]", [7, 8, 9]), ("[9:]", [9]), ("[8:50]", [8, 9])],
)
def test_a_range_of_rows_goes_over_all_files_of_a_data_set(
    model: Path, tmp_path: Path, wanted: str, rows: list[int]
) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "1.jsonl", *[question(f"q{n}", "a") for n in range(4)])
    write(tmp_path / "parts" / "2.jsonl", *[question(f"q{n}", "a") for n in range(4, 10)])
    source = {"file_name": str(tmp_path / "parts"), "split": f"train{wanted}"}
    made = make(steps_of(model, [source]))
    assert [row["messages"][0]["content"] for row in rows_of(made["fetch"])] == [f"q{n}" for n in rows]


def test_quarantined_rows_are_kept_as_they_were(model: Path, tmp_path: Path) -> None:
    torn = '{"instruction": "torn'
    bad = question("say <|im_start|>", "d")
    data = write(tmp_path / "rows.jsonl", question("a", "b"), torn, bad, question("e", "f"), question("g", "h"))
    made = make(steps_of(model, data, bad_rows="quarantine", control_tokens="refuse"))
    assert (made["fetch"].path / "report" / "quarantine.jsonl").read_text() == torn + "\n"
    (kept,) = read_lines(made["render"].path / "report" / "quarantine.jsonl")
    assert kept["messages"][0] == {"role": "user", "content": "say <|im_start|>"}


def test_too_many_bad_rows_end_the_run(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", question("a", "b"), question("c", ""), question("d", ""))
    with pytest.raises(InputError, match=r"2 of 3 rows \(67%\) cannot be used, more than bad_rows_limit 0.5"):
        make(steps_of(model, data, bad_rows="skip"))
    assert make(steps_of(model, data, bad_rows="skip", bad_rows_limit=0.7))["tokenize"].manifest["counts"]["rows"] == 1


def test_typed_control_tokens_stay_text_unless_they_are_to_be_kept(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", question("hi<|im_end|>", "ok <|im_start|>"))
    (plain,) = sequences(make(steps_of(model, data))["tokenize"])
    assert (plain["input_ids"].count(START), plain["input_ids"].count(END)) == (2, 2)
    assert answers(plain) == ["ok <|im_start|>∎"]
    (kept,) = sequences(make(steps_of(model, data, control_tokens="keep"))["tokenize"])
    assert (kept["input_ids"].count(START), kept["input_ids"].count(END)) == (3, 3)


def test_everything_but_the_bos_is_trained_when_the_prompt_is(model: Path, tmp_path: Path) -> None:
    changed = changed_model(model, tmp_path, adds_bos=True)
    data = write(tmp_path / "rows.jsonl", question("hi", "ok"))
    (row,) = sequences(make(steps_of(changed, data, train_on_prompt=True, default_system="Be."))["tokenize"])
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert bytes(row["input_ids"][2:11]) == b"system\nBe"


@pytest.mark.parametrize(("packing", "blocks"), [(True, [8, 8, 8, 4]), (False, [8, 3, 4, 8, 5])])
def test_plain_text_keeps_every_token_with_an_end_behind_each_document(
    model: Path, tmp_path: Path, packing: bool, blocks: list[int]
) -> None:
    texts = ["a" * 10, "b" * 3, "é" * 6]  # 10, 3 and 12 tokens
    data = write(tmp_path / "rows.jsonl", *[{"text": text} for text in texts])
    made = make(steps_of(model, data, stage="pt", cutoff_len=8, packing=packing))["tokenize"]
    found = sequences(made)
    assert [len(row["input_ids"]) for row in found] == blocks
    tokens = [token for row in found for token in row["input_ids"]]
    assert tokens == [token for text in texts for token in [*text.encode(), END]]
    assert [label for row in found for label in row["labels"]] == tokens
