"""benchmark: a model + questions in lm-eval's form → the numbers that lm-eval gives for it.

One decision: what enters the key is the definition with all it says, the content of the files it reads, and lm-eval's
version; where the folder is and how many questions go through the model together do not. Data that lm-eval takes from
the hub is known by the name of its task only.
"""

from __future__ import annotations

from typing import Any

from registry.benchmarks import Benchmark
from registry.stage_settings import StageSettings
from tasks.benchmark_numbers import PLAIN, metric_name
from tasks.steps import Input, LocalFolder, Step, Work
from tasks.training import BASE_FILES, keep_log

VERSION = 1  # first form


def benchmark_step(
    stage: str, name: str, label: str, model: Input, benchmark: Benchmark, settings: StageSettings
) -> Step:
    """The step that runs a benchmark.

    Args:
        stage, name: where it stands in the plan; the name begins with `benchmark:`.
        label: its name for people.
        model: the weights.
        benchmark: what `registry.benchmarks.find_benchmark` found.
        settings: of the stage the model belongs to: template, bf16, batch size.
    """
    data = settings.data
    chat = {
        "template": settings.template,
        "default_system": data.default_system,
        "enable_thinking": data.enable_thinking,
    }
    files = tuple(pattern(name) for name in benchmark.files)
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=label,
        identity={
            "benchmark": benchmark.name,
            "definition": None if benchmark.definition is None else dict(benchmark.definition),
            "num_fewshot": benchmark.num_fewshot,
            "limit": benchmark.limit,
            "apply_chat_template": benchmark.apply_chat_template,
            "bf16": settings.train.bf16,
            **({} if benchmark.seed is None else {"seed": benchmark.seed}),
            **(chat if benchmark.apply_chat_template else {}),
        },
        inputs={"model": Input(model.source, BASE_FILES)}
        | ({"data": Input(LocalFolder(benchmark.folder), files)} if benchmark.folder else {}),
        run="tasks.benchmark:run_benchmark",
        runtime={
            "per_device_eval_batch_size": settings.runtime.per_device_eval_batch_size,
            "set_names": [benchmark.name],
            "metrics": metrics_of(benchmark),
        },
        packages=("lm_eval",),
        devices=1,
    )


def metrics_of(benchmark: Benchmark) -> tuple[str, ...] | None:
    """The numbers that a benchmark gives; None where lm-eval alone knows."""
    if not benchmark.tasks or "metric_list" not in benchmark.tasks[0]:
        return None
    task = benchmark.tasks[0]
    filters = [each["name"] for each in task.get("filter_list", [{"name": PLAIN[0]}])]
    return tuple(metric_name(each["metric"], kind, len(filters)) for each in task["metric_list"] for kind in filters)


def pattern(name: str) -> str:
    """A pattern that means one file only, whatever characters its name has.

    >>> pattern("test/a[1].csv")
    'test/a[[]1].csv'
    """
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def run_benchmark(work: Work) -> dict[str, Any]:
    """Launch the benchmark program."""
    work.run("tasks.benchmark_program")
    keep_log(work)
    return {}
