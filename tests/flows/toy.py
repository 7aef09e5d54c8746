"""A recipe that runs in seconds: a tiny Llama, a few rows, three steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tiny import tiny_model

PROJECT = Path(__file__).parents[2]
LONGEST = 600.0  # seconds for one command on a machine that has much else to do; a tenth of it when it has not


def write_rows(path: Path, count: int, word: str = "row") -> Path:
    """Alpaca rows that differ."""
    rows = [{"instruction": f"say {word} {n}", "output": f"{word} {n} {'x' * (n % 7)}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def toy_recipe(folder: Path, steps: int = 4, **stage: Any) -> Path:
    """A recipe with its model and data under `folder`; the path of its file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        tiny_model(folder / "model")
        write_rows(folder / "train.jsonl", 24)
        write_rows(folder / "held_out.jsonl", 6, "other")
    settings = {
        "stage": "sft",
        "dataset": "train.jsonl",
        "cutoff_len": 160,
        "packing": True,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "max_steps": steps,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
    }
    raw = {
        "name": "toy",
        "model_name_or_path": "model",
        "stages": {"sft": settings | stage},
        "evaluation": {"perplexity": ["held_out.jsonl"], "questions": ["say row 3"], "max_new_tokens": 8},
    }
    path = folder / "toy.json"
    path.write_text(json.dumps(raw, indent=1))
    return path


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command line as a process of its own session."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments],
        cwd=PROJECT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell without job control starts what it puts in the background with Ctrl-C ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: str, code: int = 0, **environment: str) -> dict[str, Any]:
    """Run a command with `--json`; its last line of standard output, when it has one.

    Raises:
        AssertionError: it ended with another exit code, or printed more than one line.
    """
    process = start(*arguments, "--json", **environment)
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    lines = out.splitlines()
    assert len(lines) <= 1, out
    return json.loads(lines[0]) if lines else {"stderr": err}


def states(answer: dict[str, Any]) -> dict[str, str]:
    """Step title → state."""
    return {f"{step['stage']}/{step['step']}": step["state"] for step in answer["steps"]}
