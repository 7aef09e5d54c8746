"""A first recipe: what somebody wants to train, on the machine that is here.

One decision: what is written is a plain recipe with a comment behind every number that was chosen, so that it is the
last thing anybody has to ask for; nothing of it is read again by us in another way than any recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import yaml

from registry.data_registry import find_dataset
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.models import MODELS
from registry.records import DataSettings, RuntimeSettings
from tasks.architecture import read_architecture
from tasks.devices import BF16_CAPABILITY, Device, cuda_devices
from tasks.digests import DigestMemory
from tasks.estimate import GIB
from tasks.fetch import fetch_step
from tasks.formats.form import HOLDS
from tasks.raw_rows import BadRow
from tasks.source_rows import converted_rows, source_list
from tasks.steps import Step

GOALS = {
    "sft": "teach answers by example",
    "dpo": "prefer the better of two answers",
    "kto": "learn from answers marked good or bad",
    "orpo": "the better of two answers, and how to answer at all, in one stage",
    "rm": "a judge that scores answers",
    "pt": "go on pretraining on plain text",
}
FITTING = {"text": "pt", "preference": "dpo", "labelled": "kto", "chat": "sft"}
"""What rows hold → the goal they are for."""
RATES = {"sft": 2e-4, "dpo": 1e-5, "kto": 1e-5, "orpo": 5e-5, "rm": 5e-5, "pt": 1e-4}
"""Learning rates of LoRA that the field begins with."""
QUANTISED_BYTES = 0.6  # of a weight in 4 bits, with its constants and its share of the adapter
SHARE = 0.7  # of a device's memory for weights; the rest is for activations
GLOBAL_BATCH = 16  # rows of an optimizer step, where there are enough for STEPS_OF_AN_EPOCH
STEPS_OF_AN_EPOCH = 20
FEW, FEW_EPOCHS = 50, 10  # so few rows of sft are seen so often
LONGEST_QUESTION = 72  # characters, so that a line holds it
ENOUGH = 1000  # rows: how many more there are changes nothing here
COMMENT_AT = 44
ANSWERING = ("sft", "dpo", "kto", "orpo")
ON_CPU, ON_GPU = 512, 2048  # tokens of a row


@dataclass(frozen=True)
class Wish:
    """What somebody wants."""

    model: str
    data: str
    goal: str = "sft"
    rows: int | None = None
    """Usable rows, at most `ENOUGH` of them; None: not known yet."""
    question: str = "What can you do?"
    """Asked before and after."""


def look_at(wish: Wish) -> Wish:
    """The same with what the rows say: the goal they are for, how many there are, and a question of theirs.

    Rows that cannot be looked at yet are taken to be for `sft`, and not counted.

    Raises:
        InputError: there is no such data set, its rows are of no known form, or they are questions without answers; a
            single row, of which none can be kept back.
    """
    source = find_dataset(wish.data, None, "--data")
    if source.remote is not None:
        goal = "dpo" if source.ranking else "pt" if dict(source.columns) == {"prompt": "text"} else "sft"
        return replace(wish, goal=goal)
    source = replace(
        source, formatting=None, columns={}, ranking=False
    )  # what the rows are, not what they may be read as
    memory, problems = DigestMemory(Home.open().digests), list[Problem]()
    for shape in ("chat", "text", "prompt"):
        given = ((source,), DataSettings(dataset=(wish.data,)), RuntimeSettings(), shape, 0, memory)
        try:
            step = fetch_step("init", "fetch", *given, split=False)
            holds = source_list(step, {}, memory)[0].form().holds
        except InputError as error:
            problems += error.problems
            continue
        if holds in FITTING:
            return _counted(replace(wish, goal=FITTING[holds]), step)
        cure = "Recipes sft_rm_ppo and sft_rm_grpo train on such rows; `llamatuner list recipes`."
        raise InputError(Problem(f"--data {wish.data}", f"its rows are {HOLDS[holds]}", cure))
    raise InputError(problems, "--data")


def _counted(wish: Wish, step: Step) -> Wish:
    usable = (row for *_, found in converted_rows(step, {}) if not isinstance(found, BadRow) for row in found)
    rows = list(islice(usable, ENOUGH))
    if len(rows) < 2:
        rule = f"has {len(rows)} usable row{'s' * (len(rows) != 1)}; one is kept back to measure on"
        raise InputError(Problem(f"--data {wish.data}", rule, "Give more rows."))
    asked = (one["content"] for row in rows for one in row.get("messages", ())[:1] if one["role"] == "user")
    short = (text for text in asked if text.isprintable() and len(text) <= LONGEST_QUESTION)
    return replace(wish, rows=len(rows), question=next(short, wish.question))


def write_recipe(wish: Wish, path: Path) -> str:
    """A recipe's text.

    Args:
        wish: what is wanted.
        path: of the file that it will be, for its name.

    Raises:
        InputError: no such goal, or a model that this machine has too little memory for.
    """
    if wish.goal not in GOALS:
        raise InputError(Problem(f"--goal {wish.goal}", "no such goal", did_you_mean(wish.goal, list(GOALS))))
    machine, devices = _machine(), cuda_devices()
    method = _method(wish.model, machine.memory)
    goal, says, rows = wish.goal, GOALS[wish.goal], wish.rows or ENOUGH
    a_step = min(GLOBAL_BATCH, max(1, rows // STEPS_OF_AN_EPOCH))
    batch = min(4, a_step) if machine.gpu else 1
    accumulation = max(1, a_step // (batch * max(1, len(devices))))
    kept_back = ("0.05", "kept back, and measured before and after")
    if rows < 20:
        kept_back = ("1", "row kept back, and measured before and after; one says little")
    packed = goal == "sft" and a_step == GLOBAL_BATCH  # of few rows, packed ones would make too few steps
    epochs = (FEW_EPOCHS if rows < FEW else 3) if goal == "sft" else 1
    asked = [("  questions:", "answered before and after"), (f"    - {_scalar(wish.question)}", "")]
    lines: list[tuple[str, str]] = [
        (f"# {says.capitalize()}, on {machine.text}.", ""),
        *((f"#   {command:<40} {why}", "") for command, why in next_steps(path).items()),
        (f"name: {_scalar(path.stem)}", ""),
        (f"model_name_or_path: {_scalar(wish.model)}", ""),
        *method,
        ("stages:", ""),
        (f"  {goal}:", ""),
        (f"    stage: {goal}", says),
        (f"    dataset: {_scalar(wish.data)}", ""),
        (f"    val_size: {kept_back[0]}", kept_back[1]),
        (f"    cutoff_len: {ON_GPU if machine.gpu else ON_CPU}", "tokens; `plan` says how many rows are longer"),
        *([("    packing: true", "several rows in one sequence; they never see each other")] if packed else []),
        (f"    learning_rate: {RATES[goal]:.1e}", "the first thing to try others of"),
        ("    lr_scheduler_type: cosine", ""),
        ("    warmup_ratio: 0.1", ""),
        (f"    num_train_epochs: {epochs}", "times that every row is seen"),
        (f"    per_device_train_batch_size: {batch}", "lower it when memory runs out …"),
        (
            f"    gradient_accumulation_steps: {accumulation}",
            f"… and raise this: {a_step} rows make a step" if a_step > 1 else "",
        ),
        *([("    bf16: true", "half the memory, and faster")] if machine.bf16 else []),
        ("    save_steps: 50", "optimizer steps between checkpoints: at most this much is lost by a kill"),
        ("evaluation:", ""),
        *(asked if goal in ANSWERING else []),
        ("  compare_with: base", "measured as well, once for all recipes"),
    ]
    return "".join(f"{text:<{COMMENT_AT}}# {why}\n" if why else f"{text}\n" for text, why in lines)


def _scalar(text: str) -> str:
    """A text as YAML, where `no` and `~` are no texts."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./~-]*", text) and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class _Machine:
    text: str
    gpu: bool
    bf16: bool
    memory: float
    """Bytes of the smallest device, or of the machine."""


def _machine() -> _Machine:
    devices = cuda_devices()
    if devices:
        smallest: Device = min(devices, key=lambda device: device.memory_mib)
        text = f"{len(devices)} × {smallest.name} with {smallest.memory_mib / 1024:.0f} GiB"
        return _Machine(text, True, smallest.capability >= BF16_CAPABILITY, smallest.memory_mib * 2**20)
    import os

    import psutil

    memory = psutil.virtual_memory().total
    return _Machine(f"{os.cpu_count()} CPU cores with {memory / GIB:.0f} GiB", False, False, memory)


def _method(model: str, memory: float) -> list[tuple[str, str]]:
    """LoRA; with the base in 4 bits where it would not fit otherwise.

    Raises:
        InputError: it would not fit in 4 bits either.
    """
    parameters = _parameters(model)
    lora = [("finetuning_type: lora", "trains about one weight in a hundred"), ("lora_rank: 16", "")]
    if parameters is None or parameters * 2 < SHARE * memory:
        return lora
    if parameters * QUANTISED_BYTES < SHARE * memory:
        return [*lora, ("quant_bit: 4", "the frozen base in 4 bits: whole it would not fit here")]
    rule = f"{parameters / 1e9:.1f} billion weights are too many for {memory / GIB:.0f} GiB, in 4 bits as well"
    smaller = [name for name, entry in MODELS.items() if entry.size_bytes / 2 * QUANTISED_BYTES < SHARE * memory]
    cure = f"A smaller one: {', '.join(smaller[:5])}." if smaller else "Use a machine with more memory."
    raise InputError(Problem(f"--model {model}", rule, cure))


def _parameters(model: str) -> float | None:
    """How many weights a model has; None for one of the hub that nobody has described.

    Raises:
        InputError: a folder that is no model, or no model of that name.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(Problem(f"--model {model}", "a folder without config.json", "Name a model's folder."))
        found = read_architecture(folder)
        return None if found is None else found.parameters()
    if model in MODELS:
        return MODELS[model].size_bytes / 2  # two bytes for each
    if "/" not in model:
        raise InputError(Problem(f"--model {model}", "no such model", did_you_mean(model, list(MODELS))))
    return None


def next_steps(path: Path) -> Mapping[str, str]:
    """Commands that follow, and what they are for."""
    return {
        f"llamatuner plan {path}": "what would run, how many steps, what memory",
        f"llamatuner preview {path}": "rows as training sees them",
        f"llamatuner run {path}": "train and measure it",
    }
