"""Twenty-four kills at random moments, over all stages: what comes out has the bytes of a run that nobody touched.

One decision: a child is a fork of this process, killed by SIGKILL, so that each is a real death and none costs the
seconds that importing torch takes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.training_estimate import MEASURED
from tests.tasks.train.test_stages import train
from tests.tiny import tiny_model

torch.set_num_threads(1)  # a fork has none of its parent's other threads
STEPS, KILLS = 24, 4
CASES = [("pt", "lora"), ("sft", "full"), ("rm", "lora"), ("dpo", "full"), ("kto", "lora"), ("orpo", "freeze")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("kills") / "base")


def unmeasured(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not differ from one time to the next."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def progress(folder: Path) -> int:
    """The last step a run has told of; in all that was started in a folder."""
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half there
    return max((event["step"] for event in events if event["kind"] == "progress"), default=0)


def killed(folder: Path, step: int, delay: float, run: Callable[..., Any], **arguments: Any) -> None:
    """Train in a fork and kill it some moments after a step."""
    child = os.fork()
    if not child:
        try:
            run(folder, **arguments)
        except BaseException:  # noqa: BLE001 - whatever it is, a fork must not go on with its parent's tests
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(1)
    (folder / "events.jsonl").touch()
    deadline = time.monotonic() + 60
    while progress(folder) < step and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended before it was killed"
    assert progress(folder) >= step


@pytest.mark.parametrize(("stage", "method"), CASES)
def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(
    base: Path, tmp_path: Path, stage: str, method: str
) -> None:
    fields: dict[str, Any] = {"base": base, "stage": stage, "finetuning_type": method, "max_steps": STEPS}
    fields |= {"freeze_trainable_layers": 1} if method == "freeze" else {}
    fields |= {"lora_dropout": 0.1} if method == "lora" else {}
    lines = train(tmp_path / "whole", **fields)
    (tmp_path / "killed").mkdir()
    chance = random.Random(f"{stage} {method}")
    for step in sorted(chance.sample(range(1, STEPS - 6), KILLS)):
        killed(tmp_path / "killed", step, chance.uniform(0.0, 0.05), train, **fields)
    again = train(tmp_path / "killed", **fields)
    assert unmeasured(again) == unmeasured(lines)
    whole, other = (tmp_path / name / "output" for name in ("whole", "killed"))
    for path in (path for path in whole.iterdir() if path.is_file()):
        assert (other / path.name).read_bytes() == path.read_bytes(), path.name
