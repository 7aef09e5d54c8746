"""`make bench-train`: LoRA SFT of SmolLM2-135M on alpaca rows, beside TRL's trainer, in one run.

Tokens of real rows per second, pads not counted, of the same rows, with the same rank, targets and precision; the first
step is left out. TRL runs twice: with its defaults (rows padded to the longest of the batch, loss on whole texts, as a
first script has it), and like for like (packed the same, loss on answers). Each side is a process of its own, so its
peak memory is its own.

    python -m tests.benchmarks.train MODEL_FOLDER [--steps 6] [--rows 96] [--bf16]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.data import ORACLE, TEMPLATE, Memory, write_rows
from tests.benchmarks.machine import machine

CUTOFF, BATCH, RANK = 512, 4, 16
WAYS = ("ours", "trl", "trl-packed")


def ours(model: Path, data: Path, folder: Path, steps: int, bf16: bool) -> float:
    """Tokens per second of the training step, data prepared before."""
    os.environ["LLAMATUNER_HOME"] = str(folder)
    from flows.graph import build
    from registry.home import Home
    from registry.loading import load_recipe
    from tasks.artifacts import Store
    from tasks.digests import DigestMemory
    from tasks.jsonlines import read_json_lines
    from tasks.steps import do, upstream

    stage = {"stage": "sft", "dataset": [str(data)], "packing": True, "cutoff_len": CUTOFF, "lora_rank": RANK}
    # one packed sequence holds what four padded rows of a batch do
    stage |= {"per_device_train_batch_size": 1, "max_steps": steps, "bf16": bf16, "template": str(TEMPLATE)}
    home = Home.open()
    recipe = load_recipe({"name": "bench", "model_name_or_path": str(model), "stages": {"sft": stage}})
    store, memory, found = Store(home), DigestMemory(home.digests), None
    for step in upstream([build(recipe, home).stages["sft"].trained]):
        found = do(step, store, memory, threading.Event(), lambda event: None).artifact
    assert found is not None
    lines = read_json_lines(found.path / "report" / "metrics.jsonl")[1:]
    before = read_json_lines(found.path / "report" / "metrics.jsonl")[0]["tokens"]
    return float((lines[-1]["tokens"] - before) / sum(_seconds(lines, before)))


def _seconds(lines: list[dict[str, Any]], before: int) -> list[float]:
    """Seconds of each step, from its tokens and its rate."""
    tokens = [before, *(line["tokens"] for line in lines)]
    return [(tokens[n + 1] - tokens[n]) / line["tokens_per_second"] for n, line in enumerate(lines)]


def conversations(data: Path) -> list[dict[str, Any]]:
    """The rows as TRL reads them."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "messages": [
                {"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in rows
    ]


def trl(model: Path, data: Path, folder: Path, steps: int, bf16: bool, packed: bool) -> float:
    """Tokens per second of TRL's trainer."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if packed:  # the mask of answers needs markers
        tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    counted: list[tuple[float, int]] = []

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *arguments: Any) -> Any:
            started = time.perf_counter()
            mask = inputs.get("attention_mask")
            tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            result = super().training_step(model, inputs, *arguments)
            counted.append((started, tokens))
            return result

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            counted.append((time.perf_counter(), 0))

    defaults = {"per_device_train_batch_size": BATCH} if not packed else {"per_device_train_batch_size": 1}
    arguments = SFTConfig(
        output_dir=str(folder),
        max_length=CUTOFF,
        max_steps=steps,
        packing=packed,
        assistant_only_loss=packed,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=steps,
        disable_tqdm=True,
        **defaults,
    )
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16" if bf16 else "float32"),
        args=arguments,
        train_dataset=Dataset.from_list(conversations(data)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Ends()],
    )
    trainer.train()
    ends = [index for index, (_, tokens) in enumerate(counted) if tokens == 0]
    first = ends[0]
    tokens = sum(tokens for _, tokens in counted[first + 1 :])
    return tokens / (counted[-1][0] - counted[first][0])


def measure(way: str, arguments: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """One way, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.train", arguments.model, "--way", way, "--data", str(data)]
    command += ["--folder", str(folder), "--steps", str(arguments.steps), *(["--bf16"] if arguments.bf16 else [])]
    with Memory() as memory:
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"way": way, "tokens_per_second": float(answer.stdout.splitlines()[-1]), "peak_bytes": memory.peak}


def report(results: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The table of the documentation."""
    names = {"ours": "LLamaTuner, defaults", "trl": "TRL, defaults", "trl-packed": "TRL, packed, loss on answers"}
    kind = "bfloat16" if arguments.bf16 else "float32"
    lines = [
        machine(),
        "",
        f"| LoRA SFT, SmolLM2-135M, {CUTOFF} tokens, {kind} | tokens/s | peak memory |",
        "|---|---|---|",
    ]
    for result in results:
        size = result["peak_bytes"] / 1e6
        lines.append(f"| {names[result['way']]} | {result['tokens_per_second']:.0f} | {size:,.0f} MB |")
    first = results[0]["tokens_per_second"]
    for result in results[1:]:
        lines.append(f"| ratio to {names[result['way']]} | {first / result['tokens_per_second']:.2f} x | |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct, e.g. the artifact of the demo's base/model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        own = {"ours": ours, "trl": trl, "trl-packed": trl}[chosen.way]
        more = {} if chosen.way == "ours" else {"packed": chosen.way == "trl-packed"}
        print(own(Path(chosen.model), chosen.data, chosen.folder, chosen.steps, chosen.bf16, **more))  # type: ignore[arg-type]
        return
    if not ORACLE.is_dir():
        sys.exit(f"{ORACLE} is not there; the rows come from it (LLAMATUNER_ORACLE)")
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder) / "rows.jsonl", 0, chosen.rows)
        results = [measure(way, chosen, data, Path(folder) / way) for way in WAYS]
    print(report(results, chosen))


if __name__ == "__main__":
    main()
