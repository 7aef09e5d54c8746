"""What a tokenize artifact holds: `datasets` opens it, and its sequences are exactly its rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
import torch
from datasets import load_from_disk
from transformers import LlamaForCausalLM

from tasks.packing import blocks
from tasks.raw_rows import CHUNK_ROWS
from tasks.sequences import TokenizedRows, TokenizedSequences, write_index
from tasks.train.batches import Rows, collate
from tests.tasks.test_data_steps import make, question, steps_of, write
from tests.tiny import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_datasets_opens_the_shards_with_a_row_for_each_row(model: Path, tmp_path: Path) -> None:
    rows = [question(f"q{n}", "é" * (1 + n % 5)) for n in range(CHUNK_ROWS + 20)]
    artifact = make(steps_of(model, write(tmp_path / "rows.jsonl", *rows), packing=True, cutoff_len=200))["tokenize"]
    saved, found = load_from_disk(str(artifact.path)), TokenizedRows(artifact.path)
    types = {name: str(kind) for name, kind in saved.features.items()}
    assert types == {"input_ids": "List(Value('int32'))", "labels": "List(Value('int32'))"} | {
        "row": "Value('int64')",
        "line": "Value('int32')",
    }
    assert len(found.shards) == 2
    assert len(saved) == len(found) == len(rows)
    assert list(saved["row"]) == list(range(len(rows)))
    assert list(saved["line"]) == [number + 1 for number in range(len(rows))]
    for number in (0, 7, CHUNK_ROWS - 1, CHUNK_ROWS, len(rows) - 1):
        ids, labels = found.piece(number, 0, int(found.lengths()[number]))
        assert (ids.tolist(), labels.tolist()) == (saved[number]["input_ids"], saved[number]["labels"])


def test_packed_sequences_hold_every_row_of_every_shard_once_and_as_it_is(model: Path, tmp_path: Path) -> None:
    rows = [question(f"q{n}", "x" * (1 + n * 7 % 40)) for n in range(CHUNK_ROWS + 20)]
    artifact = make(steps_of(model, write(tmp_path / "rows.jsonl", *rows), packing=True, cutoff_len=150))["tokenize"]
    saved, found = load_from_disk(str(artifact.path)), TokenizedSequences(artifact.path)
    ids, labels = list(saved["input_ids"]), list(saved["labels"])
    seen: list[int] = []
    for index in range(len(found)):
        sequence, members = found[index], found.rows_of(index)
        assert sequence.input_ids.tolist() == [token for row in members for token in ids[row]]
        assert sequence.labels.tolist() == [label for row in members for label in labels[row]]
        assert sequence.seq_lengths.tolist() == [len(ids[row]) for row in members]
        seen += members
    assert sorted(seen) == list(range(len(rows)))
    assert found.lengths().tolist() == [len(found[index].input_ids) for index in range(len(found))]
    assert found.lengths().max() <= 150


def test_blocks_cut_out_of_rows_hold_every_token_in_order(model: Path, tmp_path: Path) -> None:
    rows = [question(f"q{n}", "x" * (1 + n * 7 % 40)) for n in range(9)]
    artifact = make(steps_of(model, write(tmp_path / "rows.jsonl", *rows)))["tokenize"]
    folder = Path(shutil.copytree(artifact.path, tmp_path / "blocks"))
    lengths = TokenizedRows(folder).lengths()
    write_index(folder, blocks(numpy.arange(len(lengths)), lengths, 32))
    saved, found = load_from_disk(str(folder)), TokenizedSequences(folder)
    together = numpy.concatenate([found[index].input_ids for index in range(len(found))]).tolist()
    assert together == [token for ids in saved["input_ids"] for token in ids]
    assert set(found.lengths()[:-1].tolist()) == {32}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_rows_of_a_packed_artifact_have_the_logits_they_have_alone(
    model: Path, tmp_path: Path, attention: str, training: bool
) -> None:
    rows = [question(f"q{n}", "x" * (1 + n * 5 % 17)) for n in range(12)]
    artifact = make(steps_of(model, write(tmp_path / "rows.jsonl", *rows), packing=True, cutoff_len=150))["tokenize"]
    sequences, found = Rows(str(artifact.path), VOCABULARY), TokenizedSequences(artifact.path)
    network = LlamaForCausalLM.from_pretrained(model, attn_implementation=attention).train(training)
    compared = 0
    with torch.no_grad():
        packed = network(**collate([sequences[index] for index in range(len(found))], packing=True).inputs).logits
        for index in range(len(found)):
            begin = 0
            for length in found[index].seq_lengths.tolist():
                ids = torch.tensor([found[index].input_ids[begin : begin + length].tolist()])
                alone = network(input_ids=ids).logits[0]
                assert (packed[index, begin : begin + length] - alone).abs().max() <= 1e-5
                begin, compared = begin + length, compared + 1
    assert compared == len(rows) > len(found) > 1
