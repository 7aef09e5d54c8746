"""Ids and labels of many rows at once are those of the reference, token by token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from tokenizers import AddedToken, Tokenizer, processors

from tasks.tokens import (
    FASTOKENS,
    TOKENIZERS,
    Text,
    TextEncoder,
    TokenBatch,
    bytes_of_ids,
    is_byte_level,
    join,
    with_end,
)
from tests.tasks.test_data_steps import answers, make, question, sequences, steps_of, write
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def cut_up(text: str) -> list[int]:
    """Byte offsets of spans at places that cut words."""
    places = sorted({0, len(text) // 3, len(text) // 2, 2 * len(text) // 3, len(text)})
    flat = [len(text[:place].encode()) for place in places]
    return flat[: len(flat) // 2 * 2]


def rows(batch: TokenBatch) -> list[tuple[list[int], list[bool]]]:
    """The rows of a batch as lists."""
    spans = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    return [(batch.ids[a:b].tolist(), batch.trained[a:b].tolist()) for a, b in spans]


@pytest.mark.parametrize("library", [FASTOKENS, TOKENIZERS])
def test_a_typed_control_token_stays_text(model: Path, library: str) -> None:
    encoder = TextEncoder(model, frozenset({"<s>", "<|im_end|>"}), library)
    text = "é<s>a<|im_end|><|im_end|>"
    typed = [2, 5, 6, 16]
    (ids, marks), plain = rows(encoder.encode([Text(text, [5, 16], typed), Text("a", [])]))
    assert ids == [*"é<s>a<|im_end|>".encode(), 260]
    assert marks == [5 <= place < 16 for place in range(16)] + [False]
    assert plain == ([97], [False])


def with_bos(model: Path, folder: Path, **more: Any) -> Path:
    """The tiny model, with a tokenizer that puts `<s>` in front; and with other parts of its JSON."""
    shutil.copytree(model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 257)])
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | more))
    return folder


@pytest.mark.parametrize("library", [FASTOKENS, TOKENIZERS])
def test_there_is_one_bos_also_where_somebody_typed_one_at_the_start(model: Path, tmp_path: Path, library: str) -> None:
    encoder = TextEncoder(with_bos(model, tmp_path / "bos"), frozenset({"<s>"}), library)
    texts = [Text("<s>a", [0, 4]), Text("<s>a", [0, 4], [0, 3]), Text("a", [0, 1]), Text("", [])]
    assert rows(encoder.encode(texts)) == [
        ([257, 97], [True, True]),
        ([257, *b"<s>a"], [False, True, True, True, True]),
        ([257, 97], [False, True]),
        ([257], [False]),
    ]


def test_tokens_are_added_selected_cut_and_labelled_row_by_row() -> None:
    given: Sequence[Any] = [([1, 2, 3], [False, True, True]), ([], []), ([4], [True]), ([5, 6], [False, False])]
    batch = join(given)
    assert rows(batch) == given
    assert batch.lengths().tolist() == [3, 0, 1, 2]
    assert batch.labels().tolist() == [-100, 2, 3, 4, -100, -100]
    assert batch.trained_tokens().tolist() == [2, 0, 0, 0]  # the first token of a row is never predicted
    assert rows(with_end(batch, 9)) == [([*ids, 9], [*marks, True]) for ids, marks in given]
    assert rows(batch.select(numpy.array([True, False, False, True]))) == [given[0], given[3]]
    assert rows(batch.cut(numpy.array([2, 5, 0, 1]))) == [([1, 2], [False, True]), ([], []), ([], []), ([5], [False])]
    assert rows(join([])) == []


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_added_tokens_that_swallow_white_space_go_to_the_reference(
    model: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "strip"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<cut>", normalized=False, special=True, **flags)])
    tokenizer.save(str(folder / "tokenizer.json"))
    fast, slow = (TextEncoder(folder, frozenset({"<cut>"}), library) for library in (FASTOKENS, TOKENIZERS))
    texts = [Text(text, cut_up(text)) for text in ("a  <cut>  b", "<cut>", " <cut>\n", "a<cut>b", "é <cut> é")]
    assert rows(fast.encode(texts)) == rows(slow.encode(texts))
    assert fast.agrees(texts)


def test_offsets_that_leave_out_white_space_move_no_label(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "trims"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fast, slow = (TextEncoder(folder, frozenset(), library) for library in (FASTOKENS, TOKENIZERS))
    texts = [Text("a  b ", [1, 3]), Text(" ", [0, 1]), Text("a b", [2, 3])]
    wanted = [[False, True, True, False, False], [True], [False, False, True]]
    assert [marks for _, marks in rows(fast.encode(texts))] == wanted
    assert [marks for _, marks in rows(slow.encode(texts))] == wanted


def test_which_tokenizers_spell_bytes() -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False}
    model: dict[str, Any] = {"vocab": {"a": 0, "Ġb": 2}}
    assert is_byte_level({"pre_tokenizer": level, "model": model})
    assert is_byte_level({"pre_tokenizer": {"pretokenizers": [{"type": "Split"}, level]}, "model": model})
    assert is_byte_level({"pre_tokenizer": level, "normalizer": {"type": "NFC"}, "model": model})
    assert not is_byte_level({"pre_tokenizer": level, "normalizer": {"type": "Lowercase"}, "model": model})
    assert not is_byte_level({"pre_tokenizer": level | {"add_prefix_space": True}, "model": model})
    assert not is_byte_level({"pre_tokenizer": {"type": "Metaspace"}, "model": model})
    assert not is_byte_level({"pre_tokenizer": None, "model": model})
    assert not is_byte_level({"pre_tokenizer": level, "model": {"vocab": [["a", 0.0]]}})
    added = [{"id": 4, "content": "<é>"}]
    assert bytes_of_ids({"model": model, "added_tokens": added}).tolist() == [1, 0, 2, 0, 4]


def merging(model: Path, folder: Path, dropout: float) -> Path:
    """The tiny model with a tokenizer that merges `h e` to 261, unless dropout leaves the merge out."""
    shutil.copytree(model, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    data["model"] |= {"type": "BPE", "dropout": dropout, "merges": ["h e"]}
    data["model"]["vocab"] |= added | {"he": 261}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_where_the_libraries_differ_all_rows_are_done_by_the_reference_with_a_note(model: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", *[question("q", "no" if n else "the") for n in range(3)])
    notes: list[str] = []
    plain = make(steps_of(merging(model, tmp_path / "plain", 0.0), rows))["tokenize"]
    other = merging(model, tmp_path / "dropout", 1.0)  # the reference knows no chance, fastokens leaves all merges out
    made = make(steps_of(other, rows), lambda event: notes.append(str(event.get("text"))))["tokenize"]
    assert [one.manifest["counts"]["library"] for one in (plain, made)] == [FASTOKENS, TOKENIZERS]
    assert "fastokens and tokenizers give different ids for a row; tokenizers does the work" in notes
    assert sequences(made) == sequences(plain)
    assert sequences(made)[0]["input_ids"].count(261) == 1


def test_a_tokenizer_the_fast_library_does_not_do_leaves_the_work_to_the_reference_with_a_note(
    model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "lower"))
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    notes: list[str] = []
    rows = write(tmp_path / "rows.jsonl", question("hi", "YES"))
    made = make(steps_of(folder, rows), lambda event: notes.append(str(event.get("text"))))
    assert made["tokenize"].manifest["counts"]["library"] == TOKENIZERS
    assert "the tokenizer is not one that fastokens does; tokenizers does the work" in notes
    assert answers(sequences(made["tokenize"])[0]) == ["yes∎"]
