"""`make bench-ppo`: PPO with LoRA on SmolLM2-135M, beside TRL's trainer, in one run.

TRL had a PPO up to 1.12 (`trl.experimental.ppo`): PEER names a folder with that version, as `pip install --no-deps
--target PEER trl==1.12.0` makes it. Both sides: 8 prompts of under 64 tokens in a step, 32 new tokens, 2 passes, LoRA
of rank 8 on every linear module, a reward model with a head on the same base, and no gradient checkpointing. TRL holds
reward model and critic as models of their own and trains all of the critic, as it has no other way. Answers may end
early with both. Each side is a process of its own, so its peak memory is its own, and they take turns step by step,
because the speed of a machine changes within minutes; the first step is left out.

    python -m tests.benchmarks.ppo MODEL_FOLDER PEER [--steps 4] [--bf16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.data import Memory
from tests.benchmarks.machine import machine

PROMPTS, NEW, EPOCHS, RANK = 8, 32, 2, 8
QUESTIONS = (
    *("Who are you, and what can you do for me today?", "What is a cached step of a pipeline?", "Name three fruits."),
    *("Why does the loss not fall after the first epoch?", "How do I go on with a run that was killed in the night?"),
    *("What is LoRA?", "Explain in one sentence what a hash is.", "Which of two models should be released, and why?"),
)


class Turns:
    """Lets two processes work step by step, one at a time.

    Args:
        folder: that both know.
        own, other: names.
    """

    def __init__(self, folder: Path, own: str, other: str) -> None:
        self.file, self.own, self.other = folder / "turn", own, other
        self.over = folder / f"{other}.over"
        self.seconds: list[float] = []

    def begin(self) -> None:
        """Wait for the turn; it is the other's until that has made its first step."""
        while self.file.read_text() != self.own and not self.over.exists():
            time.sleep(0.02)
        self.began = time.perf_counter()

    def end(self) -> None:
        """Count the step, and give the turn away."""
        self.seconds.append(time.perf_counter() - self.began)
        part = self.file.with_suffix(f".{self.own}")  # the other one never reads half of it
        part.write_text(self.other)
        part.rename(self.file)

    def finish(self) -> list[float]:
        """Seconds of every step; the other one goes on alone."""
        (self.file.parent / f"{self.own}.over").touch()
        return self.seconds


def prompt_ids(model: Path) -> list[list[int]]:
    """The questions as the model is asked them."""
    from tasks.answers import Chat

    chat = Chat.from_folder(model)
    return [chat.prompt(question) for question in QUESTIONS]


def reward_adapter(model: Path, folder: Path) -> Path:
    """A reward model that nobody has trained, as an adapter: what it says does not matter here, its cost does."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tasks.train.loading import load_base
    from tasks.train.lora import BASE_RECORD
    from tasks.train.output import save_weights

    base = load_base(str(model), torch.float32, score=True)
    config = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    save_weights(get_peft_model(base, config), folder)
    (folder / BASE_RECORD).write_text(json.dumps({"base_digest": "base"}), encoding="utf-8")
    return folder


def ours(model: Path, adapter: Path, folder: Path, steps: int, bf16: bool, turns: Turns) -> list[float]:
    """Seconds of each step."""
    from tasks.program import Events
    from tasks.train.online.loop import Loop
    from tasks.train.online.program import work

    class InTurns(Loop):
        def step(self) -> Any:
            turns.begin()
            made = super().step()
            turns.end()
            return made

    import tasks.train.online.loop

    tasks.train.online.loop.Loop = InTurns  # type: ignore[misc]
    spec = _spec(model, adapter, folder, steps, bf16)
    work(spec, Events(spec.events))
    return turns.finish()


def floor(model: Path, adapter: Path, folder: Path, steps: int, bf16: bool) -> list[float]:
    """One copy of the base with a LoRA adapter, and the activations of one forward pass: no PPO can do with less."""
    import torch

    from tasks.train.online.inputs import Answered, make_inputs
    from tasks.train.online.program import work  # noqa: F401 - with all that it loads
    from tasks.train.online.roles import make_roles
    from tasks.train.online.rollout import Sampling
    from tasks.train.online.scoring import token_logps

    spec = _spec(model, adapter, folder, steps, bf16)
    spec.inputs.pop("reward_adapter")
    roles = make_roles(spec, {})
    answers = [Answered(0, ids, [1] * NEW, False, None) for ids in prompt_ids(model)]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logps = token_logps(roles.policy, make_inputs(answers, torch.device("cpu"), False), Sampling())
    return [1.0, float(logps.isfinite().all())]


def _spec(model: Path, adapter: Path, folder: Path, steps: int, bf16: bool) -> Any:
    from registry.records import TrainSettings
    from tasks.program import Spec
    from tests.tiny import write_shards, write_spec

    rows = [{"input_ids": ids, "labels": [-100] * len(ids)} for ids in prompt_ids(model)]
    shards = write_shards(folder / "shards", rows, "prompt", [None] * len(rows))
    settings = TrainSettings(
        stage="ppo",
        reward_model="rm",
        max_new_tokens=NEW,
        per_device_train_batch_size=PROMPTS,
        ppo_epochs=EPOCHS,
        max_steps=steps,
        lora_rank=RANK,
        bf16=bf16,
    ).identity()
    runtime = {"logging_steps": 1, "save_steps": 1000, "save_total_limit": 1, "sample_steps": 1000}
    identity = {"train": settings, "packing": False, "base_digest": "base", "template": None}
    inputs = {"base": model, "shards": shards, "reward_adapter": adapter}
    return Spec.read(write_spec(folder / "run", identity, inputs, runtime))


def trl(model: Path, folder: Path, steps: int, bf16: bool, turns: Turns) -> list[float]:
    """Seconds of each step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    dtype = torch.bfloat16 if bf16 else torch.float32
    judges = [AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype) for _ in range(2)]
    for judge in judges:
        judge.config.pad_token_id = tokenizer.pad_token_id

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()
            if len(turns.seconds) < steps:
                turns.begin()

    arguments = PPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PROMPTS,
        num_ppo_epochs=EPOCHS,
        total_episodes=PROMPTS * steps,
        response_length=NEW,
        temperature=1.0,
        stop_token="eos",
        learning_rate=5e-5,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"input_ids": ids} for ids in prompt_ids(model)])
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        ref_model=None,
        reward_model=judges[0],
        value_model=judges[1],
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Ends()],
    )
    turns.begin()
    trainer.train()
    return turns.finish()


def start(way: str, chosen: argparse.Namespace, adapter: Path, folder: Path) -> subprocess.Popen[str]:
    """One way, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.ppo", chosen.model, chosen.peer, "--way", way]
    command += ["--folder", str(folder), "--adapter", str(adapter), "--steps", str(chosen.steps)]
    (folder / way).mkdir()
    return subprocess.Popen([*command, *(["--bf16"] if chosen.bf16 else [])], stdout=subprocess.PIPE, text=True)


def measure(ways: Sequence[str], chosen: argparse.Namespace, adapter: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Ways side by side: samples per second, and the most memory of each."""
    started = {way: start(way, chosen, adapter, folder) for way in ways}
    memories = {way: Memory(process.pid) for way, process in started.items()}
    results = {}
    with ExitStack() as stack:
        for memory in memories.values():
            stack.enter_context(memory)
        for way, process in started.items():
            answer, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{way} ended with exit code {process.returncode}")
            seconds = json.loads(answer.splitlines()[-1])
            results[way] = {"samples_per_second": PROMPTS / median(seconds[1:]), "peak_bytes": memories[way].peak}
    return results


def report(results: dict[str, dict[str, Any]], chosen: argparse.Namespace) -> str:
    """The table of the documentation."""
    kind = "bfloat16" if chosen.bf16 else "float32"
    lines = [machine(), "", f"| PPO, LoRA, SmolLM2-135M, {kind} | samples/s | peak memory |", "|---|---|---|"]
    for way, name in (("ours", "LLamaTuner"), ("trl", "TRL 1.12")):
        found = results[way]
        lines.append(f"| {name} | {found['samples_per_second']:.3f} | {found['peak_bytes'] / 1e6:,.0f} MB |")
    speed = results["ours"]["samples_per_second"] / results["trl"]["samples_per_second"]
    size = results["ours"]["peak_bytes"] / results["trl"]["peak_bytes"]
    least = results["floor"]["peak_bytes"]
    lines.append(f"| ratio | {speed:.2f} x | {size:.2f} x |")
    lines.append(f"| one base copy and one forward pass | | {least / 1e6:,.0f} MB |")
    lines.append(f"| LLamaTuner to that | | {results['ours']['peak_bytes'] / least:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct, e.g. the artifact of the demo's base/model")
    parser.add_argument("peer", help="folder with TRL 1.12")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    for name in ("--way", "--folder", "--adapter"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    model = Path(chosen.model)
    if chosen.way:
        print(json.dumps(one_way(chosen.way, chosen, model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter = reward_adapter(model, Path(folder) / "adapter")
        (Path(folder) / "turn").write_text("ours")
        results = measure(("floor",), chosen, adapter, Path(folder))
        results |= measure(("ours", "trl"), chosen, adapter, Path(folder))
    print(report(results, chosen))


def one_way(way: str, chosen: argparse.Namespace, model: Path) -> list[float]:
    """Seconds of each step of a way, in this process."""
    root, adapter = Path(chosen.folder), Path(chosen.adapter)
    if way == "floor":
        return floor(model, adapter, root / way, chosen.steps, chosen.bf16)
    turns = Turns(root, way, "trl" if way == "ours" else "ours")
    if way == "ours":
        return ours(model, adapter, root / way, chosen.steps, chosen.bf16, turns)
    sys.path.insert(0, chosen.peer)
    return trl(model, root / way, chosen.steps, chosen.bf16, turns)


if __name__ == "__main__":
    main()
