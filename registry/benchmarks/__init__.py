"""Benchmarks by name: the YAML files of this folder, lm-eval's own tasks, and task files of a user's.

One decision: a benchmark is a definition in lm-eval's own form, and lm-eval does the asking. The files here are its
tasks over data files of one's own, with its prompts, choices and metrics: a number means the same wherever the
questions come from. `{subject}` in a file stands for each subject that is there; they are one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from registry.benchmarks.harness import harness_tasks
from registry.benchmarks.task_files import (
    SUBJECT,
    Definition,
    data_files,
    files_of,
    read_task,
    with_files,
    without_examples,
)
from registry.core import Registry, user_path
from registry.errors import InputError, Problem, did_you_mean
from registry.evaluation_records import BenchmarkSettings, EvaluationSettings

ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class BenchmarkEntry:
    """A benchmark that is read from files."""

    name: str
    """What a recipe writes."""
    description: str
    definition: Definition
    """In lm-eval's form; with `{subject}` in it, of each subject."""

    @property
    def summary(self) -> str:
        """Description and files, as a list shows them."""
        files = [name for names in data_files(self.definition).values() for name in names]
        return f"{self.description} Files under data_dir: {', '.join(files)}"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as it is to be run."""

    name: str
    """Its name in results."""
    definition: Mapping[str, Any] | None
    """lm-eval's form of a task, or of a group with its tasks in it; None: lm-eval's own task of that name."""
    folder: Path | None = None
    """Where its files are; None: they come from the hub."""
    files: tuple[str, ...] = ()
    """All that are read, relative to the folder."""
    num_fewshot: int | None = None
    """Solved examples; None, only without definition: as many as lm-eval has for the task."""
    limit: int | None = None
    """Most questions; of a group, of each of its tasks."""
    apply_chat_template: bool = False
    seed: int | None = None
    """Seed of examples and answers that are drawn; None where nothing is."""

    @property
    def tasks(self) -> tuple[Definition, ...]:
        """The definitions of its tasks; none for lm-eval's own."""
        if self.definition is None:
            return ()
        found = self.definition["task"]
        return tuple(found) if "group" in self.definition else (dict(self.definition),)


def read_benchmarks() -> Iterator[tuple[str, BenchmarkEntry]]:
    """Name and entry of every file here."""
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        definition = read_task(path)
        yield path.stem, BenchmarkEntry(path.stem, definition["metadata"]["description"], definition)


BENCHMARKS: Registry[BenchmarkEntry] = Registry("benchmark", read_benchmarks)


def find_benchmark(wanted: str | BenchmarkSettings, evaluation: EvaluationSettings, where: str) -> Benchmark:
    """The benchmark that a recipe means.

    Args:
        wanted: a name, a task file, or one of both with settings of its own.
        evaluation: settings of all benchmarks, and the folder of their files.
        where: key path, for the error.

    Raises:
        InputError: an unknown name, with the nearest ones; a task file that cannot be used; every file that is not
            there; solved examples where there are none to take.
    """
    own = wanted if isinstance(wanted, BenchmarkSettings) else BenchmarkSettings(task=wanted)
    shots = evaluation.num_fewshot if own.num_fewshot is None else own.num_fewshot
    chat = evaluation.apply_chat_template if own.apply_chat_template is None else own.apply_chat_template
    limit = evaluation.limit if own.limit is None else own.limit
    definition, folders = _definition(own.task, evaluation.data_dir, where)
    if definition is None:
        return Benchmark(own.task, None, None, (), shots, limit, chat, evaluation.seed)
    name = (definition.get("metadata") or {}).get("group") or definition["task"]
    shots = (definition.get("num_fewshot") or 0) if shots is None else shots
    if shots:
        _require_examples(definition, shots, where)
    else:
        definition = without_examples(definition)
    folder = _folder(definition, folders)
    found = with_files(definition, folder, where)
    benchmark = Benchmark(name, found, folder, (), shots, limit, chat)
    names = {name for task in benchmark.tasks for names in data_files(task).values() for name in names}
    seed = evaluation.seed if _draws(definition, shots) else None
    return Benchmark(name, found, folder if names else None, tuple(sorted(names)), shots, limit, chat, seed)


def _definition(name: str, data_dir: str | None, where: str) -> tuple[Definition | None, list[Path]]:
    """What a name means, and where its files may be; None for lm-eval's own."""
    folders = _data_folders(data_dir, name) if data_dir else []
    if name.endswith(ENDINGS):
        path = user_path(name, where).absolute()
        if not path.is_file():
            raise InputError(Problem(where, f"the task file {path} does not exist", "Check the path."))
        return read_task(path), [*folders, path.parent]
    if name in BENCHMARKS and folders:
        return BENCHMARKS[name].definition, folders
    if name in harness_tasks():
        return None, []
    if name in BENCHMARKS:
        cure = "Set evaluation.data_dir to the folder with its files; docs/evaluation.md says which."
        raise InputError(Problem(where, f"{name} is read from files only", cure))
    known = [*BENCHMARKS, *sorted(harness_tasks())]
    close = get_close_matches(name, known, n=3, cutoff=0.6)
    cure = did_you_mean(name, close or list(BENCHMARKS)) + " Any task of lm-eval may be named; a file ends in .yaml."
    raise InputError(Problem(where, f"{name!r} is not a known benchmark", cure))


def _data_folders(data_dir: str, name: str) -> list[Path]:
    """The benchmark's own folder in `data_dir`, where there is one, and `data_dir` itself."""
    folder = user_path(data_dir, "evaluation.data_dir").absolute()
    if not folder.is_dir():
        raise InputError(Problem("evaluation.data_dir", f"{folder} is not a folder", "Check the path."))
    own = folder / name
    return [own, folder] if name in BENCHMARKS and own.is_dir() else [folder]


def _folder(definition: Definition, folders: list[Path]) -> Path:
    """The first folder that has a file of a definition; else the first one."""
    names = [name.replace(SUBJECT, "*") for names in data_files(definition).values() for name in names]
    return next((folder for folder in folders if any(files_of(folder, name) for name in names)), folders[0])


def _require_examples(definition: Definition, shots: int, where: str) -> None:
    config = definition.get("fewshot_config") or {}
    split = definition.get("fewshot_split") or definition.get("training_split") or config.get("split")
    if not split and not config.get("samples"):
        rule = f"{definition['task']} has no examples to show in front of a question, and num_fewshot is {shots}"
        raise InputError(Problem(where, rule, "Write it as {task: …, num_fewshot: 0}."))
    # lm-eval keeps the question itself out of its examples only where both are of the test split
    if split == definition.get("validation_split") and not definition.get("test_split"):
        rule = f"{definition['task']} takes its examples from the questions that are asked"
        raise InputError(Problem(where, rule, "Write test_split instead of validation_split, or name a fewshot_split."))


def _draws(definition: Definition, shots: int) -> bool:
    """Whether anything is drawn: the examples, or the answers."""
    sampler = (definition.get("fewshot_config") or {}).get("sampler", "default")
    sampled = bool((definition.get("generation_kwargs") or {}).get("do_sample"))
    return sampled or (shots > 0 and sampler != "first_n")
