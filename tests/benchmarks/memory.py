"""`make bench-memory`: memory of training, estimated and measured, for models like Llama made on the fly.

What is measured is the most memory the training program ever had, less what it had with all libraries loaded and no
model yet; each case is a process of its own.

    python -m tests.benchmarks.memory [--cases 3]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.combinations import ONLINE
from tests.benchmarks.machine import machine
from tests.tiny import tiny_model, write_shards, write_spec

STEPS, ROWS = 2, 8
DRAWN = {"reward_funcs": ("length",), "max_new_tokens": 128, "ppo_epochs": 1}
"""Of stages that draw answers: half of a row's tokens, where it has 256."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    hidden: int
    layers: int
    vocabulary: int
    method: str = "lora"
    bf16: bool = False
    batch: int = 1
    length: int = 512
    more: tuple[tuple[str, Any], ...] = ()
    """Other settings of training."""

    def words(self) -> str:
        """For the table."""
        kind = "bf16" if self.bf16 else "fp32"
        more = "".join(f", {name} {value}" for name, value in self.more if name not in DRAWN)
        return f"h {self.hidden}, {self.layers} layers, v {self.vocabulary}, {self.method} {kind}{more}"


LARGEST = (768, 12, 32000)
CASES = (
    Case(256, 4, 8192, batch=4, length=256),
    Case(512, 8, 49152, batch=1, length=1024),
    Case(512, 8, 8192, batch=4, length=1024),
    Case(*LARGEST, batch=1, length=256),
    Case(*LARGEST, batch=2, length=512),
    Case(*LARGEST, batch=1, length=256, bf16=True),
    Case(*LARGEST, batch=2, length=512, more=(("gradient_checkpointing", True),)),
    Case(*LARGEST, batch=1, length=256, more=(("quant_bit", 4),)),
    Case(*LARGEST, batch=1, length=256, more=(("stage", "dpo"),)),
    Case(256, 4, 8192, "full", batch=4, length=256),
    Case(512, 8, 49152, "full", batch=1, length=512),
    Case(*LARGEST, "full", batch=1, length=256),
    Case(*LARGEST, "full", batch=2, length=512),
    Case(*LARGEST, "full", batch=1, length=256, bf16=True),
    Case(*LARGEST, "full", batch=1, length=256, more=(("optim", "sgd"),)),
    Case(*LARGEST, "full", batch=1, length=256, more=(("gradient_accumulation_steps", 2),)),
    Case(*LARGEST, "full", batch=1, length=256, more=(("stage", "dpo"),)),
    Case(*LARGEST, batch=4, length=256, more=(("stage", "ppo"), *DRAWN.items())),
    Case(512, 8, 49152, batch=8, length=256, bf16=True, more=(("stage", "ppo"), *DRAWN.items())),
    Case(512, 8, 8192, batch=8, length=256, more=(("stage", "grpo"), *DRAWN.items())),
    Case(512, 8, 8192, "full", batch=4, length=256, more=(("stage", "ppo"), *DRAWN.items())),
    # not among those that the constants of `tasks.estimate` were measured with; the first has SmolLM2-135M's shapes
    Case(576, 30, 49152, batch=1, length=512),
    Case(384, 6, 16384, "full", batch=2, length=256),
)


def make_model(case: Case, folder: Path) -> Path:
    """A random model of the case's size."""
    return tiny_model(
        folder,
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=max(1, case.hidden // 192),
        max_position_embeddings=2048,
        initializer_range=0.02,
    )


def make_shards(case: Case, folder: Path) -> Path:
    """Rows as long as the case says, two thirds of each trained; pairs where they are compared; prompts of which no two
    begin alike where answers are drawn, which make up the rest of the length."""
    stage = dict(case.more).get("stage")
    if stage in ONLINE:
        length = case.length - DRAWN["max_new_tokens"]
        rows = [[1 + (number * 17 + place) % 200 for place in range(length)] for number in range(ROWS)]
        prompts = [{"input_ids": row, "labels": [-100] * length} for row in rows]
        return write_shards(folder, prompts, "prompt", [None] * ROWS)
    pieces = 2 if stage == "dpo" else 1
    row = [1 + number % 200 for number in range(case.length)]
    labels = [-100] * (case.length // 3) + row[case.length // 3 :]
    whole = {"input_ids": row * pieces, "labels": labels * pieces, "seq_lengths": [case.length] * pieces}
    return write_shards(folder, [whole] * ROWS, "preference" if pieces == 2 else "chat")


def prepare(case: Case, folder: Path) -> Path:
    """Model, rows and spec of a case; the spec's path."""
    from registry.records import TrainSettings

    folder.mkdir(parents=True)
    inputs = {"base": make_model(case, folder / "base"), "shards": make_shards(case, folder / "shards")}
    fields = dict(case.more)
    runtime = {"logging_steps": 1, "save_steps": 100, "save_total_limit": 1, "sample_steps": 100, "base_name": "bench"}
    runtime["gradient_checkpointing"] = fields.pop("gradient_checkpointing", False)
    settings = TrainSettings(
        finetuning_type=case.method,
        bf16=case.bf16,
        per_device_train_batch_size=case.batch,
        max_steps=STEPS,
        nproc_per_node=1,
        **fields,
    )
    identity = {"train": settings.identity(), "packing": False, "base_digest": "bench", "template": None}
    return write_spec(folder / "run", identity, inputs, runtime)


def train(path: Path) -> None:
    """Do what a spec says."""
    from tasks.program import OPTIONAL, Events, Spec, hide
    from tasks.train.program import optional_packages, work

    spec = Spec.read(path)
    if spec.settings["train"]["stage"] in ONLINE:
        from tasks.train.online.program import work
    hide(OPTIONAL - optional_packages(spec))
    work(spec, Events(spec.events))


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Train a few steps in a new process, which has the libraries already; what was written about memory, GiB."""
    fork = multiprocessing.get_context("fork")
    for target, arguments in ((prepare, (case, folder)), (train, (folder / "run" / "spec.json",))):
        process = fork.Process(target=target, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{case.words()}: exit code {process.exitcode}")
    found: dict[str, Any] = json.loads((folder / "run/output/report/memory.json").read_text())
    return found


def report(results: list[tuple[Case, dict[str, Any]]]) -> str:
    """The table of the documentation."""
    lines = [
        machine(),
        "",
        "| model, training | rows x tokens | estimated | measured | error |",
        "|---|---|---|---|---|",
    ]
    for case, found in results:
        estimated, measured = found["estimated_gib"]["total"], found["measured_gib"]
        size = f"{case.batch} x {case.length}"
        error = (estimated - measured) / measured
        lines.append(f"| {case.words()} | {size} | {estimated:.2f} GiB | {measured:.2f} GiB | {error:+.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases, from 0; nothing means all")
    chosen = parser.parse_args()
    # once for all cases, before the first process is forked
    import tasks.train.held_out
    import tasks.train.model
    import tasks.train.online.loop  # noqa: F401

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            if not chosen.cases or number in chosen.cases:
                results.append((case, measure(case, Path(folder) / str(number))))
                print(case.words(), case.batch, case.length, results[-1][1], file=sys.stderr, flush=True)
    print(report(results))


if __name__ == "__main__":
    main()
