"""What is measured of a run, and how near the estimate of its memory comes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from registry.peak_flops import BF16_PEAKS
from registry.records import TrainSettings
from tasks.train.batches import Rows, collate
from tasks.train.compared import collate_pairs
from tasks.train.measure import StepSpeed, peak_bytes, resident_bytes
from tasks.train.trainer import StepCounts
from tasks.training_estimate import MEMORY_FILE
from tests.benchmarks.memory import DRAWN, Case, prepare
from tests.tasks.test_estimate import WORKED
from tests.tiny import pack_rows, random_pairs, random_rows, write_shards


def settings(**fields: Any) -> dict[str, Any]:
    return TrainSettings(**({"finetuning_type": "full", "nproc_per_node": 1} | fields)).identity()


def test_a_packed_sequence_holds_several_samples_and_a_pair_is_one(tmp_path: Path) -> None:
    one, two, three = random_rows(3, shortest=5, longest=5)
    packed = Rows(str(write_shards(tmp_path / "packed", [pack_rows([one, two]), three])), 264)
    batch = collate([packed[0], packed[1]], packing=True)
    assert (batch.samples, batch.tokens, batch.squares) == (3, 15, 3 * 25)
    pairs = Rows(str(write_shards(tmp_path / "pairs", random_pairs(2), "preference")), 264, pieces=2)
    batch = collate_pairs([pairs[0], pairs[1], pairs[-1]])  # the last keeps a process busy, and is none
    assert batch.samples == 2
    assert batch.squares == sum(int(part) ** 2 for number in (0, 1) for part in pairs[number]["seq_lengths"])


def test_a_row_cut_into_blocks_is_a_sample_where_it_begins(tmp_path: Path) -> None:
    from tasks.packing import blocks
    from tasks.sequences import TokenizedSequences, write_index

    folder = write_shards(tmp_path / "shards", random_rows(2, shortest=6, longest=6))
    write_index(folder, blocks(numpy.arange(2), numpy.array([6, 6]), 4))  # rows of 6 in blocks of 4: 0 0 0 0|0 0 1 1|…
    data = TokenizedSequences(folder)
    assert [data.begun(number) for number in range(len(data))] == [1, 1, 0]


def test_rates_are_counts_over_seconds() -> None:
    counts = StepCounts(tokens=100, trained=50, samples=3, squares=1000)
    assert StepSpeed(WORKED, settings(), 1).rates(counts, 0.5) == {
        "tokens_per_second": 200,
        "trained_tokens_per_second": 100,
        "samples_per_second": 6,
    }


def test_utilisation_is_operations_over_the_peak_of_all_devices() -> None:
    speed = StepSpeed(WORKED, settings(), 1)
    assert speed.peak == 0  # of a processor nothing is known
    speed.peak = 2 * 1320.0
    counts = StepCounts(tokens=4, trained=2, samples=1, squares=8)
    assert speed.rates(counts, 0.5)["mfu"] == 0.5  # 660 operations in half a second


def test_peaks_are_those_of_dense_products() -> None:
    assert BF16_PEAKS["NVIDIA H100 80GB HBM3"] == 989.5e12  # 1,979 TFLOPS with sparsity
    assert BF16_PEAKS["NVIDIA A100-SXM4-80GB"] == 312e12
    assert all(6e13 < peak < 3e15 for peak in BF16_PEAKS.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    own = b"x" * (1 << 30)  # more than the child will have
    script = "from tasks.train.measure import *; b = bytearray(300 << 20); del b; print(peak_bytes(), resident_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak, now = map(int, done.stdout.split())
    assert peak - now > 250 << 20
    assert peak < len(own) < resident_bytes() <= peak_bytes()


CASES = {
    "tasks.train.program": Case(768, 8, 8192, "full", batch=1, length=64),
    "tasks.train.online.program": Case(512, 8, 8192, batch=4, length=256, more=(("stage", "ppo"), *DRAWN.items())),
}


@pytest.mark.parametrize("program", CASES)
def test_memory_is_what_was_estimated_to_a_fifth(tmp_path: Path, program: str) -> None:
    spec = prepare(CASES[program], tmp_path / "case")
    command = [sys.executable, "-m", program, str(spec)]
    subprocess.run(command, check=True, capture_output=True)  # a process of its own: this one had more before
    found = json.loads((spec.parent / "output" / MEMORY_FILE).read_text())
    assert found["device"] == "cpu"
    assert found["measured_gib"] == pytest.approx(found["estimated_gib"]["total"], rel=0.2)
