"""`make bench-data`: alpaca rows to packed Arrow shards with labels, beside TRL's own preparation, in one run.

The rows are the oracle's alpaca demo set, made unique by a number in each instruction. Both sides use the same
tokenizer file and chat template and mask everything but the answers; two worker processes each. Both are timed twice:
from the start of a process to its end, as whoever types a command sees it, and with everything ready (TRL: trainer and
tokenizer made; ours: a process that prepared another data set before). Then a large data set: memory of all processes
together, time, and the time for 1 % more rows.

    python -m tests.benchmarks.data [--rows 20000] [--large 1000000] [--skip-peer]
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
from statistics import median
from typing import Any

import psutil

from tests.benchmarks.machine import machine

PROJECT = Path(__file__).parents[2]
ORACLE = Path(os.environ.get("LLAMATUNER_ORACLE") or PROJECT.parent / "shared" / "oracle")
TEMPLATE = PROJECT / "registry" / "templates" / "smollm2.jinja"
CUTOFF, WORKERS, REPEATS = 2048, 2, 3


def write_rows(path: Path, first: int, last: int, mode: str = "w", mark: str = "") -> Path:
    """Rows first to last of the endless alpaca set, as JSON lines."""
    rows = json.loads((ORACLE / "datasets" / "llamafactory" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    with open(path, mode, encoding="utf-8") as file:
        for number in range(first, last):
            row = rows[number % len(rows)]
            row = row | {"instruction": f"{row['instruction']} ({mark}{number})"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def write_model(folder: Path) -> Path:
    """A folder with SmolLM2's tokenizer and template; its weights are never read."""
    import numpy
    from safetensors.numpy import save_file

    source = ORACLE / "tokenizers" / "smollm2"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"none": numpy.zeros(1, numpy.float32)}, folder / "model.safetensors")
    return folder


class Memory:
    """The resident memory of a process (this one) and all it started, together, sampled ten times a second."""

    def __init__(self, pid: int | None = None) -> None:
        self.peak, self._end, self._pid = 0, threading.Event(), pid
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process(self._pid)
        while not self._end.wait(0.1):
            total = 0
            try:
                everybody = [own, *own.children(recursive=True)]
            except psutil.NoSuchProcess:  # it has ended
                return
            for process in everybody:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)


def ours(data: Path, model: Path, home: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of fetch, render and tokenize with packing, and the counts of the last."""
    from flows.graph import build
    from registry.home import Home
    from registry.loading import load_recipe
    from tasks.artifacts import Store
    from tasks.digests import DigestMemory
    from tasks.steps import do

    os.environ["LLAMATUNER_HOME"] = str(home)
    stage = {"stage": "sft", "dataset": [str(data)], "packing": True, "cutoff_len": CUTOFF, "template": str(TEMPLATE)}
    stage["preprocessing_num_workers"] = WORKERS
    started = time.perf_counter()
    recipe = load_recipe({"name": "bench", "model_name_or_path": str(model), "stages": {"sft": stage}})
    opened = Home.open()
    store, memory = Store(opened), DigestMemory(opened.digests)
    counts: dict[str, Any] = {}
    for step in build(recipe, opened).data_only().steps:
        counts = do(step, store, memory, threading.Event(), lambda event: None).artifact.manifest["counts"]
    return time.perf_counter() - started, counts


def peer(data: Path, folder: Path) -> tuple[float, int]:
    """Seconds of TRL's preparation from the same file, its trainer and tokenizer ready before; and its sequences."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(ORACLE / "tokenizers" / "smollm2" / "tokenizer.json"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **size, **heads))
    settings = SFTConfig(
        output_dir=str(folder),
        packing=True,
        max_length=CUTOFF,
        dataset_num_proc=WORKERS,
        assistant_only_loss=True,
        report_to=[],
        bf16=False,
        use_cpu=True,
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"messages": turns}] * 2),
        processing_class=tokenizer,
    )

    def converted(row: dict[str, str]) -> dict[str, Any]:
        question = "\n".join(filter(None, (row["instruction"], row["input"])))
        return {"messages": [turns[0] | {"content": question}, turns[1] | {"content": row["output"]}]}

    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder / "cache"))
    rows = rows.map(converted, remove_columns=rows.column_names, num_proc=WORKERS)
    made = trainer._prepare_dataset(rows, tokenizer, settings, True, None, "train")
    made.save_to_disk(str(folder / "saved"))
    return time.perf_counter() - started, len(made)


def in_a_process(side: str, *paths: Path) -> dict[str, Any]:
    """One preparation by a process of its own: what it measured, and its seconds from start to end."""
    command = [sys.executable, "-m", "tests.benchmarks.data", "--side", side, *map(str, paths)]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True)
    whole = time.perf_counter() - started
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured | {"whole_seconds": whole}


def one_side(side: str, paths: list[Path]) -> dict[str, Any]:
    """What a process of its own does and measures."""
    if side == "peer":
        seconds, sequences = peer(*paths)
        return {"seconds": seconds, "sequences": sequences}
    seconds, counts = ours(*paths)
    return {"seconds": seconds} | {name: counts[name] for name in ("tokens", "filled", "sequences")}


def compare(rows: int, with_peer: bool, root: Path) -> dict[str, Any]:
    """Ours and the peer's on the same rows, turn by turn: whole processes, and with everything ready."""
    model, data = write_model(root / "model"), write_rows(root / "rows.jsonl", 0, rows)
    warm_up = write_rows(root / "other.jsonl", 0, rows // 2, mark="other ")
    ours(warm_up, model, root / "warm_up")
    first, ready, peers = [], [], []
    for number in range(REPEATS):
        first.append(in_a_process("ours", data, model, root / f"first{number}"))
        ready.append(ours(data, model, root / f"ready{number}")[0])
        if with_peer:
            peers.append(in_a_process("peer", data, root / f"peer{number}"))
    result = {"rows": rows} | {name: first[0][name] for name in ("tokens", "filled", "sequences")}
    result |= {"whole_seconds": median(one["whole_seconds"] for one in first), "ready_seconds": median(ready)}
    result["first_seconds"] = median(one["seconds"] for one in first)
    if peers:
        result["peer_sequences"] = peers[0]["sequences"]
        result["peer_whole_seconds"] = median(one["whole_seconds"] for one in peers)
        result["peer_ready_seconds"] = median(one["seconds"] for one in peers)
    return result


def large(rows: int, root: Path) -> dict[str, Any]:
    """Time and memory for many rows, for half of them, and for one percent more."""
    model, data = write_model(root / "large_model"), write_rows(root / "large.jsonl", 0, rows // 2)
    half, _ = ours(data, model, root / "half")
    write_rows(data, rows // 2, rows, mode="a")
    with Memory() as memory:
        whole, counts = ours(data, model, root / "whole")
        first_peak = memory.peak
        write_rows(data, rows, rows + rows // 100, mode="a")
        more, _ = ours(data, model, root / "whole")
    return {
        "rows": rows,
        "bytes": data.stat().st_size,
        "tokens": counts["tokens"],
        "half_seconds": half,
        "whole_seconds": whole,
        "peak_bytes": first_peak,
        "append_seconds": more,
    }


def report(small: dict[str, Any], many: dict[str, Any] | None) -> str:
    """The table of the documentation."""
    lines = [
        machine(),
        "",
        f"| {small['rows']:,} alpaca rows, {small['tokens']:,} tokens, packed to {CUTOFF} | seconds | rows/s | fill |",
        "|---|---|---|---|",
    ]
    fills = {"": small["filled"]}
    if "peer_sequences" in small:
        fills["peer_"] = small["tokens"] / (small["peer_sequences"] * CUTOFF)
    names = {"": "LLamaTuner", "peer_": "TRL"}
    timed = {"whole": "a whole process", "ready": "everything ready"}
    for time_name, said in timed.items():
        for side, fill in fills.items():
            seconds = small[f"{side}{time_name}_seconds"]
            rate = small["rows"] / seconds
            lines.append(f"| {names[side]}, {said} | {seconds:.2f} | {rate:,.0f} | {fill:.2%} |")
        if "peer_" in fills:
            ratio = small[f"peer_{time_name}_seconds"] / small[f"{time_name}_seconds"]
            lines.append(f"| ratio, {said} | | {ratio:.1f} x | |")
    first = small["first_seconds"]
    lines.append(f"| LLamaTuner, a whole process but for its start | {first:.2f} | {small['rows'] / first:,.0f} | |")
    if many:
        lines += ["", f"| {many['rows']:,} rows, {many['bytes'] / 1e6:,.0f} MB | |", "|---|---|"]
        lines += [
            f"| time | {many['whole_seconds']:.1f} s, {many['rows'] / many['whole_seconds']:,.0f} rows/s |",
            f"| time of half of them | {many['half_seconds']:.1f} s |",
            f"| peak memory of all processes | {many['peak_bytes'] / 1e6:,.0f} MB |",
            f"| 1 % more rows | {many['append_seconds']:.2f} s, "
            f"{many['append_seconds'] / many['whole_seconds']:.1%} of the first time |",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--side", choices=["ours", "peer"], help="used by the benchmark itself")
    parser.add_argument("paths", nargs="*", type=Path)
    chosen = parser.parse_args()
    if chosen.side:
        print(json.dumps(one_side(chosen.side, chosen.paths)))
        return
    if not ORACLE.is_dir():
        sys.exit(f"{ORACLE} is not there; the rows and the tokenizer come from it (LLAMATUNER_ORACLE)")
    with tempfile.TemporaryDirectory(dir=os.environ.get("LLAMATUNER_BENCH_DIR")) as folder:
        many = large(chosen.large, Path(folder)) if chosen.large else None
        small = compare(chosen.rows, not chosen.skip_peer, Path(folder))
    print(report(small, many))


if __name__ == "__main__":
    main()
