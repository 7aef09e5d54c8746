"""Benchmarks as files: lm-eval's own form of a task, without what runs code, and the data files that it reads.

One decision: a task file is data. Functions, classes, metrics that are fetched from the hub as programs and other files
to include are refused with the reason; all that is left is known, so the key of a measurement can hold it.
"""

from __future__ import annotations

import copy
import csv
import gzip
import json
import re
from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

import yaml

from registry.core import read_text, read_yaml
from registry.errors import InputError, Problem, did_you_mean

KEYS = (
    *("task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs"),
    *("training_split", "validation_split", "test_split", "fewshot_split", "fewshot_config", "num_fewshot"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter"),
    *("gen_prefix", "output_type", "generation_kwargs", "repeats", "filter_list", "metric_list"),
    *("should_decontaminate", "doc_to_decontamination_query", "metadata"),
)
CODE = "it runs code; a task file of your own holds data and templates only"
REFUSED = {
    **dict.fromkeys(("class", "custom_dataset", "process_docs", "process_results", "unsafe_code"), CODE),
    **dict.fromkeys(("doc_to_image", "doc_to_audio"), "the models here read text only"),
    "use_prompt": "it takes the prompt from another package",
    "include": "a task file of your own is one file",
    "group": "a file holds one task",
}
METRICS = (
    *("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "exact_match", "f1", "mcc", "brier_score", "likelihood"),
    *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "bleu", "chrf", "chrf++", "ter"),
)
OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood", "loglikelihood_rolling")
REQUIRED = ("task", "dataset_path", "output_type", "doc_to_target")
READERS = ("json", "csv", "text", "parquet", "arrow")
"""Values of `dataset_path` that mean local files; any other is a data set on the hub."""
SUBJECT, WORDS = "{subject}", "{subject_words}"
NAME = re.compile(r"[\w.-]+")
Definition = dict[str, Any]


def read_task(path: Path) -> Definition:
    """A task file.

    Raises:
        InputError: everything in it that is unreadable, unknown, missing or code.
    """
    text = read_text(path)
    if problems := list(_tags(text, path)):
        raise InputError(problems, str(path))
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(Problem(str(path), "a task is a mapping, in the form of lm-eval"))
    if problems := list(_problems(values, str(path))):
        raise InputError(problems, str(path))
    return values


def _tags(text: str, path: Path) -> Iterator[Problem]:
    try:
        events = list(yaml.parse(text, yaml.SafeLoader))
    except yaml.YAMLError:
        return  # `read_yaml` says what and where
    for event in events:
        tag = getattr(event, "tag", None)
        if tag and not re.fullmatch(r"tag:yaml\.org,2002:(str|int|float|bool|null|map|seq)", tag):
            place = f"{path}:{event.start_mark.line + 1}" if event.start_mark else str(path)
            yield Problem(place, f"the YAML tag {tag} is refused: {CODE}")


def _problems(values: Definition, where: str) -> Iterator[Problem]:
    for key, value in values.items():
        if key in REFUSED:
            yield Problem(f"{where}: {key}", f"refused: {REFUSED[key]}")
        elif key not in KEYS:
            yield Problem(f"{where}: {key}", "unknown key", did_you_mean(key, KEYS))
        elif key.endswith("_split") and not isinstance(value, str | None):
            yield Problem(f"{where}: {key}", f"{value!r} is not the name of a split")
    for key in REQUIRED:
        if values.get(key) is None:
            yield Problem(f"{where}: {key}", "missing")
    if not isinstance(values.get("task"), str) or not NAME.fullmatch(values["task"].replace(SUBJECT, "")):
        yield Problem(f"{where}: task", f"{values.get('task')!r} is not a name", "Use letters, digits, `_`, `-`, `.`.")
    if not values.get("test_split") and not values.get("validation_split"):
        yield Problem(f"{where}: test_split", "missing", "Name the split whose questions are asked.")
    if (kind := values.get("output_type")) is not None and kind not in OUTPUT_TYPES:
        yield Problem(f"{where}: output_type", f"{kind!r} is not known", did_you_mean(str(kind), OUTPUT_TYPES))
    shots = values.get("num_fewshot", 0)
    if type(shots) is not int or shots < 0:
        yield Problem(f"{where}: num_fewshot", f"{shots!r} is not a number of examples")
    for key, kind in (("dataset_kwargs", dict), ("fewshot_config", dict), ("metadata", dict), ("metric_list", list)):
        if values.get(key) is not None and not isinstance(values[key], kind):
            yield Problem(f"{where}: {key}", f"{values[key]!r} is not a {'mapping' if kind is dict else 'list'}")
            return
    yield from _metric_problems(values.get("metric_list") or [], f"{where}: metric_list")
    problems = list(_source_problems(values, where))
    yield from problems or _file_problems(values, where)


def _metric_problems(metrics: list[Any], where: str) -> Iterator[Problem]:
    for metric in metrics:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if not isinstance(metric, dict) or name not in METRICS:
            yield Problem(where, f"{name!r} is not a metric of lm-eval", did_you_mean(str(name), METRICS))
        elif metric.get("hf_evaluate"):
            yield Problem(where, f"{name}: hf_evaluate is refused: it fetches a program from the hub")


def _source_problems(values: Definition, where: str) -> Iterator[Problem]:
    source, arguments = values.get("dataset_path"), values.get("dataset_kwargs") or {}
    for key in ("trust_remote_code", "data_dir"):
        if key in arguments:
            reason = CODE if key == "trust_remote_code" else "the files could not be told; name them in data_files"
            yield Problem(f"{where}: dataset_kwargs.{key}", f"refused: {reason}")
    if source in READERS and not arguments.get("data_files"):
        yield Problem(f"{where}: dataset_kwargs.data_files", "missing", "Name the files: {test: questions.jsonl}.")
    elif source is not None and source not in READERS and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        cure = f"Write one of {', '.join(READERS)} and dataset_kwargs.data_files, or a data set of the hub."
        yield Problem(f"{where}: dataset_path", f"{source!r} is refused", cure)


def _file_problems(values: Definition, where: str) -> Iterator[Problem]:
    if values.get("dataset_path") not in READERS:
        return
    files, place = values["dataset_kwargs"]["data_files"], f"{where}: dataset_kwargs.data_files"
    splits = list(files.values()) if isinstance(files, dict) else [files]
    if not all(isinstance(name, str) for names in splits for name in (names if isinstance(names, list) else [names])):
        yield Problem(place, f"{files!r} are no files", "Name the files: {test: questions.jsonl}.")
        return
    there = data_files(values)
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if values.get(key) and values[key] not in there:
            yield Problem(f"{where}: {key}", f"{values[key]!r} has no files", f"data_files has {', '.join(there)}.")
    if any(SUBJECT in name for names in there.values() for name in names):
        if SUBJECT not in str(values.get("task")):
            yield Problem(f"{where}: task", f"it needs {SUBJECT} as well, to tell the tasks apart")
        if not (values.get("metadata") or {}).get("group"):
            yield Problem(f"{where}: metadata.group", "missing", f"{SUBJECT} needs a name for the whole.")
        if not values.get("metric_list"):
            yield Problem(f"{where}: metric_list", "missing", "Name the metrics of the whole.")
        if there.get(asked_split(values), [""])[0].count(SUBJECT) != 1:
            yield Problem(place, f"the file of {asked_split(values)} needs {SUBJECT} once")
    elif SUBJECT in str(values.get("task")):
        yield Problem(place, f"no file has {SUBJECT}")


def data_files(definition: Definition) -> dict[str, list[str]]:
    """Split → its files, as a definition names them; empty for a data set of the hub."""
    if definition["dataset_path"] not in READERS:
        return {}
    files = definition["dataset_kwargs"]["data_files"]
    splits = files if isinstance(files, Mapping) else {"train": files}  # as `datasets` reads it
    return {split: [names] if isinstance(names, str) else list(names) for split, names in splits.items()}


def asked_split(definition: Definition) -> str:
    """The split whose questions are asked."""
    return str(definition.get("test_split") or definition.get("validation_split"))


def without_examples(definition: Definition) -> Definition:
    """The same for no solved examples: files that only have examples are not read."""
    asked = {asked_split(definition)}
    kept = {key: value for key, value in definition.items() if key not in ("fewshot_split", "training_split")}
    if files := data_files(definition):
        needed = {split: names for split, names in files.items() if split in asked}
        kept["dataset_kwargs"] = {**definition["dataset_kwargs"], "data_files": needed or files}
    return kept


def with_files(definition: Definition, folder: Path, where: str) -> Definition:
    """The definition with the files that are there, relative to a folder; filled in for every subject there is.

    Raises:
        InputError: every file that is not there, or lacks a column.
    """
    metadata = definition.get("metadata") or {}
    bare = {key: metadata[key] for key in ("version",) if key in metadata}
    plain = {**copy.deepcopy(definition), "metadata": bare}
    if SUBJECT not in definition["task"]:
        return _checked([plain], folder, where, metadata)[0]
    files = data_files(definition)
    asked = files[asked_split(definition)][0]
    words = metadata.get("subjects") or {}
    subjects = list(_subjects(folder, asked))
    if not subjects:
        raise InputError(Problem(where, f"{folder / asked.replace(SUBJECT, '*')}: there is no such file", CURE))
    filled = [_fill(plain, {SUBJECT: s, WORDS: words.get(s, s.replace("_", " "))}) for s in subjects]
    metrics = [{"metric": metric["metric"], "weight_by_size": True} for metric in definition["metric_list"]]
    return {
        "group": metadata["group"],
        "task": _checked(filled, folder, where, metadata),
        "aggregate_metric_list": metrics,
        "metadata": bare,
    }


CURE = "Check `evaluation.data_dir`; docs/evaluation.md says which files a benchmark reads."


def _subjects(folder: Path, pattern: str) -> Iterator[str]:
    before, after = pattern.split(SUBJECT)
    for path in sorted(folder.glob(f"{escape(before)}*{escape(after)}")):
        name = path.relative_to(folder).as_posix()
        subject = name[len(before) : len(name) - len(after)]
        if NAME.fullmatch(subject):
            yield subject


def _fill(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(inner, words) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, words) for inner in value]
    if isinstance(value, str):
        for placeholder, word in words.items():
            value = value.replace(placeholder, word)
    return value


def _checked(tasks: list[Definition], folder: Path, where: str, metadata: Mapping[str, Any]) -> list[Definition]:
    problems: list[Problem] = []
    for task in tasks:
        found: dict[str, list[str]] = {}
        for split, names in data_files(task).items():
            found[split] = []
            for name in names:
                there = files_of(folder, name)
                found[split] += there
                if not there:
                    problems.append(Problem(where, f"{folder / name} is not there", CURE))
                problems += [p for each in there for p in _lacking(folder / each, metadata.get("columns", ()), where)]
        if found:
            task["dataset_kwargs"] = {**task["dataset_kwargs"], "data_files": found}
    if problems:
        raise InputError(problems, where)
    return tasks


def files_of(folder: Path, name: str) -> list[str]:
    """The files that a name or pattern means, relative to the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "://" in name:
        return []
    if (folder / name).is_file():
        return [name]
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(name) if path.is_file())


def _lacking(path: Path, columns: tuple[str, ...], where: str) -> Iterator[Problem]:
    """Columns that a file lacks: else the first question would be read as their names."""
    missing = [column for column in columns if column not in _first_row(path)] if columns else []
    if missing:
        rule = f"{path} has no column {', '.join(missing)}"
        yield Problem(
            where, rule, f"It needs the columns {', '.join(columns)}, named in the first line of a .csv file."
        )


def _first_row(path: Path) -> list[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            if ".csv" in path.suffixes:
                return next(csv.reader(file), [])
            if ".jsonl" in path.suffixes:
                first = json.loads(file.readline())
            else:
                rows = json.load(file)
                first = rows[0] if isinstance(rows, list) and rows else {}
            return list(first) if isinstance(first, dict) else []
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(Problem(str(path), f"cannot be read: {error}", "Copy the file again.")) from error
