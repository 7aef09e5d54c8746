"""Questions of the tests' own, and benchmarks that are run on them: by the program, and by lm-eval alone."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch

from registry.benchmarks import find_benchmark
from registry.evaluation_records import BenchmarkSettings, EvaluationSettings
from registry.recipe import StageSettings
from tasks.benchmark import benchmark_step
from tasks.benchmark_program import ready, work
from tasks.measurements import DRAWN
from tasks.program import Events, Spec
from tasks.steps import Input, LocalFolder, Step
from tasks.train.loading import load_base
from tests.tiny import read_lines, write_spec

WORDS = ["sun", "rain", "a cold wind", "stone", "the sea", "two", "iron", "a red leaf", "sand"]
OWN = """\
task: rivers
dataset_path: json
dataset_kwargs: {data_files: {test: rivers.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


def write_questions(folder: Path) -> Path:
    """Twelve questions of science, two subjects, sums, and texts."""
    draw = random.Random(3)
    rows = []
    for number in range(12):
        choices = draw.sample(WORDS, 3 + number % 2)
        listed = " ".join(f"Answer{place}: {choice}" for place, choice in enumerate(choices, 1))
        forms = "/".join(f"answer{place}" for place in range(1, len(choices) + 1))
        text = (
            f"Please choose the correct answer to the question: What is {number}?\n\n{listed}\n\nAnswer format: {forms}"
        )
        rows.append({"instruction": text, "answer": f"answer{draw.randint(1, len(choices))}"})
    (folder / "ARC-Easy_test.json").write_text(json.dumps(rows))
    for name, count in (("test/law_test", 7), ("dev/law_dev", 3), ("test/old_art_test", 5), ("dev/old_art_dev", 3)):
        (folder / name).parent.mkdir(exist_ok=True)
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            for number in range(count):
                # numbers and gaps that a reader must leave as they are written
                writer.writerow([f"What, {number}?", "1.50", "007", "NA", draw.choice(WORDS), draw.randint(0, 3)])
    for name in ("train", "test"):
        sums = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(6)]
        lines = [{"question": f"{a} + {b}?", "answer": f"{a}+{b}\n#### {a + b}"} for a, b in sums]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [{"text": " ".join(draw.choices(WORDS, k=3 + number))} for number in range(9)]
    (folder / "rivers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    (folder / "rivers.yaml").write_text(OWN)
    return folder


def step(name: str, data: Path, folder: Path, settings: StageSettings, **own: Any) -> Step:
    wanted = BenchmarkSettings(task=name, **own)
    benchmark = find_benchmark(wanted, EvaluationSettings(data_dir=str(data)), "evaluation.benchmarks")
    model = Input(LocalFolder(folder))
    return benchmark_step("sft", f"benchmark:{benchmark.name}", "tiny", model, benchmark, settings)


class Run:
    """A benchmark that was run."""

    def __init__(self, made: Step, folder: Path, model: Path, batch_size: int = 8) -> None:
        inputs = {name: one.source.path for name, one in made.inputs.items() if isinstance(one.source, LocalFolder)}
        runtime = {**made.runtime, "per_device_eval_batch_size": batch_size}
        self.path = write_spec(folder, made.identity, {**inputs, "model": model}, runtime)
        spec = Spec.read(self.path)
        work(spec, Events(spec.events))
        output = folder / "output"
        self.results: dict[str, Any] = json.loads((output / "results.json").read_text())
        self.samples = read_lines(output / "samples.jsonl")
        self.events = read_lines(folder / "events.jsonl")
        self.report = json.loads((output / "report" / "lm_eval.json").read_text())
        with numpy.load(output / DRAWN) as drawn:
            self.drawn = dict(drawn)

    def value(self, metric: str) -> float:
        return float(self.results[f"{metric}.0"]["value"])


def directly(
    made: Step, folder: Path, batch_size: int, model: Any = None, softmax_dtype: str | None = None, **more: Any
) -> Any:
    """The same definitions run by lm-eval alone, from a file as a person would."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    given, source = made.identity["definition"], made.inputs["data"].source
    assert isinstance(source, LocalFolder)
    tasks = given["task"] if "group" in given else [given]
    specs = [ready(task, source.path, made.identity["num_fewshot"]) for task in tasks]
    lm = HFLM(
        pretrained=model or load_base(str(folder), torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=batch_size,
        softmax_dtype=softmax_dtype,
    )
    seed = made.identity.get("seed", 0)
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=specs,
        task_manager=TaskManager(include_defaults=False),
        limit=made.identity["limit"],
        bootstrap_iters=0,
        fewshot_random_seed=seed,
        **more,
    )
