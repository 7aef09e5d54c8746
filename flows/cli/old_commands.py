"""`train` and `eval`: the commands of LLaMA-Factory and of the LLamaTuner before this one, as people type them.

One decision: a config that is trained this way behaves as it did there: relative paths start at the working directory,
`data` is the folder of data sets where there is one, and the model is written to `output_dir`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from flows.cli.output import DONE, FAILED, people, say_error
from registry.core import read_text, read_yaml
from registry.data_registry import INFO_FILES
from registry.errors import InputError, Problem
from registry.loading import SUFFIXES, find_recipe, load_recipe, override
from registry.recipes import RECIPES
from registry.stages import METHODS

FLAG = "--"
DATA = "data"  # where those programs look for dataset_info.json
DIGEST = re.compile(r"content digest `([0-9a-f]+)`")  # in the card of an export


def read_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """A config file, where one is named, and `key=value` for everything else.

    >>> read_arguments(["a.yaml", "learning_rate=1e-4"])
    ('a.yaml', ['learning_rate=1e-4'])
    >>> read_arguments(["--stage", "sft", "--do_train", "--lora_rank=8", "--freeze_trainable_layers", "-2"])
    (None, ['stage=sft', 'do_train=true', 'lora_rank=8', 'freeze_trainable_layers=-2'])

    Raises:
        InputError: a word that is no flag, no value and no `key=value`.
    """
    words, file, found, problems = list(arguments), None, list[str](), list[Problem]()
    if words and not words[0].startswith(FLAG) and (words[0].endswith(SUFFIXES) or "=" not in words[0]):
        file = words.pop(0)
    while words:
        word = words.pop(0)
        key, sign, value = word.removeprefix(FLAG).partition("=")
        if not word.startswith(FLAG) and not sign:
            problems.append(Problem(word, "is no --flag, no key=value and no config file", "E.g. --lora_rank 8"))
        elif sign:
            found.append(f"{key}={value}")
        else:
            following = bool(words) and not words[0].startswith(FLAG) and not re.match(r"\w+=", words[0])
            found.append(f"{key}={words.pop(0) if following else 'true'}")
    if problems:
        raise InputError(problems)
    return file, found


def read_config(arguments: Sequence[str]) -> tuple[dict[str, Any] | str, list[str]]:
    """A flat config as a mapping, overrides applied; or the name of a recipe with stages, and its overrides."""
    file, overrides = read_arguments(arguments)
    if file is None:
        raw: Any = override({}, overrides)
    else:
        path = find_recipe(file)
        raw = read_yaml(read_text(path), str(path))
        if not isinstance(raw, dict) or "stages" in raw or file in RECIPES:
            return file, overrides
        raw = {"name": _name(path.stem)} | override(raw, overrides)
    if not raw:
        cure = "E.g. `llamatuner train config.yaml`, or --stage sft --model_name_or_path MODEL --dataset DATA."
        raise InputError(Problem("train", "nothing is said", cure))
    if "name" not in raw:
        raw["name"] = _name("-".join(Path(str(raw.get("output_dir") or raw.get("stage") or "train")).parts[-3:]))
    if "dataset_dir" not in raw and any(Path(DATA, info).is_file() for info in INFO_FILES):
        raw["dataset_dir"] = DATA
    return raw, []


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60] or "train"


def train_config(arguments: Sequence[str], as_json: bool) -> int:
    """Do what a config says, and write its model to `output_dir`; the exit code.

    Args:
        arguments: a config file and `key=value`, or `--key value`, as they were typed.
        as_json: print one object for programs, that of `run`.

    Raises:
        InputError: everything wrong with it, before anything is computed.
    """
    from flows.cli.running import run_recipe

    raw, overrides = read_config(arguments)
    recipe = load_recipe(raw, overrides)
    target = _target(raw) if isinstance(raw, dict) and recipe.stages else None
    code = run_recipe(raw, overrides, as_json, False)
    if code != DONE or target is None or not isinstance(raw, dict):
        return code
    return _write(raw, target, as_json)


def _target(raw: dict[str, Any]) -> Path | None:
    """The folder that the model is to be written to.

    Raises:
        InputError: it holds what LLamaTuner has not written there.
    """
    if not isinstance(raw.get("output_dir"), str):
        return None
    target = Path(raw["output_dir"]).expanduser().absolute()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not written_digest(target))):
        rule = f"{target} is there, and LLamaTuner has not written it"
        raise InputError(Problem("output_dir", rule, "Name another folder, or remove it first."))
    return target


def written_digest(folder: Path) -> str | None:
    """Digest of the model that an export has written here."""
    card = folder / "README.md"
    found = DIGEST.search(read_text(card)) if card.is_file() else None
    return found[1] if found else None


def _write(raw: dict[str, Any], target: Path, as_json: bool) -> int:
    from flows.cli.exporting import Wanted, write_model
    from flows.graph import build
    from flows.planning import plan
    from registry.home import Home
    from tasks.artifacts import Store

    console, recipe = people(as_json), load_recipe(raw)
    pipeline = build(recipe, Home.open())
    steps = next(iter(pipeline.stages.values()))
    adapter = METHODS[steps.settings.train.finetuning_type].makes == "adapter"
    made = {line.step.title: line.artifact for line in plan(pipeline, Store(Home.open()))}
    artifact = made[(steps.trained if adapter else steps.model).title]
    written = written_digest(target)
    if artifact is not None and written == artifact.digest:
        console.print(f"{target}: the model is there already", markup=False, soft_wrap=True)
        return DONE
    if written is not None and not raw.get("overwrite_output_dir"):
        say_error(f"{target} holds another model, which stays; say overwrite_output_dir=true, or name another folder")
        return FAILED
    if written is not None:
        aside = next(path for n in count(1) if not (path := target.with_name(f"{target.name}.replaced-{n}")).exists())
        target.rename(aside)
        console.print(f"the model that was there is {aside} now", markup=False, soft_wrap=True)
    if write_model(recipe, recipe.name, Wanted(to=target, adapter=adapter), console) is None:
        return FAILED
    return DONE


def evaluate_config(arguments: Sequence[str], as_json: bool) -> int:
    """Measure what a config of LLaMA-Factory's `eval` says; the exit code.

    Raises:
        InputError: it names no benchmark, or everything wrong with it.
    """
    from flows.cli.running import run_recipe

    raw, overrides = read_config(arguments)
    if isinstance(raw, str) or not raw.get("task"):
        cure = "Use `llamatuner evaluate MODEL --perplexity DATA`, or `--benchmarks TASK`, or `--generate DATA`."
        raise InputError(Problem("task", "eval measures benchmarks: mmlu_test, ceval_validation, cmmlu_test", cure))
    return run_recipe(raw, overrides, as_json, False)
