"""The program that runs a benchmark: lm-eval asks, the model answers, and what came of it is written down.

One decision: lm-eval runs in this process with the model as every other step loads it, so that an adapter, a template
and the dtype are those of the measurements beside it; nothing of lm-eval is done again here.

Run as `python -m tasks.benchmark_program SPEC.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.benchmarks.task_files import data_files
from tasks.evaluate_program import load, optional_packages, tokenizer_folder, write_lines
from tasks.measurements import write_results
from tasks.program import Events, ProgramError, Spec, main

if TYPE_CHECKING:
    from tasks.benchmark_numbers import Asked

KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "config",
)
NEEDED = {"datasets", "pandas", "scipy", "sklearn"}


def work(spec: Spec, events: Events) -> None:
    """Load, ask, write.

    Writes what `tasks.measurements` says (`<metric>.0`), `samples.jsonl` (one line per question), `report/lm_eval.json`
    (lm-eval's own results, configurations and versions) and `report/timings.json` (seconds).

    Raises:
        ProgramError: `bad_setting` for a task that lm-eval cannot use, or that has no number of its own; `network` when
            its data cannot be had; `not_finite` for a broken model.
        InputError: a chat without a usable chat template.
    """
    output, settings = Path(spec.output), spec.settings
    (output / "report").mkdir(parents=True, exist_ok=True)
    timings: dict[str, float] = {}
    clock = time.monotonic()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.monotonic()
        timings[name], clock = round(now - clock, 3), now

    template = _template(spec) if settings["apply_chat_template"] else None
    events.note("loading libraries")
    import datasets

    from tasks.benchmark_model import AskedModel, fast_tokenizer
    from tasks.benchmark_numbers import measures, require_finite, sample_lines

    lap("import")
    events.note("reading the questions")
    datasets.config.HF_DATASETS_CACHE = Path(spec.scratch) / "datasets"
    tasks = load_tasks(spec)
    lap("questions")
    events.note("loading the model")
    model, tokenizer = load(spec), fast_tokenizer(tokenizer_folder(spec))
    lap("load")
    asking = AskedModel(model, tokenizer, spec.runtime["per_device_eval_batch_size"], template, _reporter(spec, events))
    events.note("asking")
    asked = ask(asking, tasks, settings)
    require_finite(asked)
    if asking.without_system:
        events.note("the chat template takes no system message: the task's description is left out, as lm-eval does")
    shots = settings["num_fewshot"]
    if shots is not None and set(asked.results["n-shot"].values()) != {shots}:
        events.note(f"num_fewshot {shots} has no effect: lm-eval's task fixes how many examples it shows")
    lap("asked")
    found = measures(asked, settings, events.note)
    if not found:
        name = settings["benchmark"]
        raise ProgramError("bad_setting", f"{name} has no number that can be kept. Name one of its tasks instead.")
    write_results(output, {f"{name}.0": number for name, number in found.items()})
    write_lines(output / "samples.jsonl", sample_lines(asked))
    kept = {name: asked.results[name] for name in KEPT if name in asked.results}
    text = json.dumps(kept, indent=1, default=str, ensure_ascii=False)
    (output / "report" / "lm_eval.json").write_text(text, encoding="utf-8")
    lap("numbers")
    (output / "report" / "timings.json").write_text(json.dumps(timings, indent=1), encoding="utf-8")


def _template(spec: Spec) -> Any:
    """The chat template of the model, or the one to use instead of it."""
    from tasks.template import ChatTemplate

    thinking = spec.settings["enable_thinking"]
    variables = {} if thinking is None else {"enable_thinking": thinking}
    return ChatTemplate.from_folder(tokenizer_folder(spec), spec.settings["template"], variables)


def _reporter(spec: Spec, events: Events) -> Callable[[int, int], None]:
    name = spec.runtime["set_names"][0]

    def report(done: int, total: int) -> None:
        events.emit("progress", step=done, total=total, unit="requests", set=name)

    return report


def load_tasks(spec: Spec) -> list[Any]:
    """lm-eval's tasks of a benchmark, with their data: one of them, or a group.

    Raises:
        ProgramError: `bad_setting`; lm-eval cannot use the definition, or the rows do not fit it, or it runs programs
            that a model wrote; `network` when the hub is out of reach.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig
    from lm_eval.tasks import TaskManager

    settings = spec.settings
    definition = settings["definition"]
    try:
        if definition is None:  # its index of its own tasks takes 20 s
            loaded = TaskManager().load([settings["benchmark"]])
            if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
                raise ValueError("it runs programs that the model writes, which is not done here")
            return [{**loaded["tasks"], **loaded["groups"]}[settings["benchmark"]]]
        sandbox_templates()
        manager = TaskManager(include_defaults=False)
        given = definition["task"] if "group" in definition else [definition]
        folder = Path(spec.inputs["data"]) if "data" in spec.inputs else None
        loaded = manager.load([ready(task, folder, settings["num_fewshot"]) for task in given])
        tasks = list(loaded["tasks"].values())
        if "group" not in definition:
            return tasks
        wanted = [AggMetricConfig(**metric) for metric in definition["aggregate_metric_list"]]
        group = Group(definition["group"], aggregate_metric_list=wanted, metadata=definition["metadata"])
        for task in tasks:
            group.add(task)
        return [group]
    except ConnectionError as error:
        cure = "Check the network, or set evaluation.data_dir to a folder with its files."
        raise ProgramError("network", f"the data of {settings['benchmark']} cannot be had: {error}. {cure}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, TemplateError, DatasetsError) as error:
        cause = f"{type(error).__name__}: {error}"
        if error.__cause__ is not None:
            cause += f" ({error.__cause__})"
        raise ProgramError("bad_setting", f"lm-eval cannot use {settings['benchmark']}: {cause}") from error


def ready(definition: dict[str, Any], folder: Path | None, num_fewshot: int) -> dict[str, Any]:
    """A definition as lm-eval takes it here: with absolute files and its columns' types.

    Args:
        definition: of one task.
        folder: its files' folder; None: they come from the hub.
        num_fewshot: solved examples.
    """
    from datasets import Features

    task = {**definition, "num_fewshot": num_fewshot}
    arguments = dict(definition.get("dataset_kwargs") or {})
    if folder is not None:
        files = data_files(definition)
        arguments["data_files"] = {split: [str(folder / name) for name in names] for split, names in files.items()}
    if "features" in arguments:
        arguments["features"] = Features.from_dict(arguments["features"])
    return {**task, "dataset_kwargs": arguments} if arguments else task


def sandbox_templates() -> None:
    """Let templates of task files reach nothing but their row: lm-eval's environment would let them run code."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    plain = lm_eval.utils.env
    closed = SandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
    closed.filters.update(plain.filters)
    lm_eval.utils.env = closed


def ask(model: Any, tasks: list[Any], settings: dict[str, Any]) -> Asked:
    """Let lm-eval ask.

    Args:
        model: an `AskedModel`.
        tasks: what `load_tasks` made.
        settings: the step's identity.
    """
    import lm_eval
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager

    from tasks.benchmark_numbers import Asked

    seed, chat = settings.get("seed", 0), settings["apply_chat_template"]
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=None if settings["definition"] else settings["num_fewshot"],
        limit=settings["limit"],
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        system_instruction=settings["default_system"] if chat else None,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    group = tasks[0] if isinstance(tasks[0], Group) else None
    leaves = {task.task_name: task for one in tasks for task in (one.get_all_tasks() if group else [one])}
    return Asked(results, leaves, group)


def prepare(spec: Spec) -> None:
    """What libraries read when they are imported: where data sets are kept, and that local files need no hub."""
    os.environ["HF_DATASETS_CACHE"] = str(Path(spec.scratch) / "datasets")
    os.environ["TQDM_DISABLE"] = "1"
    if "data" in spec.inputs:
        os.environ["HF_HUB_OFFLINE"] = "1"


if __name__ == "__main__":
    prepare(Spec.read(sys.argv[1]))
    main(work, uses=lambda spec: NEEDED | optional_packages(spec))
