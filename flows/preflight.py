"""What can be known to go wrong before anything starts: disk, device, templates, rows."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from flows.boards import wandb_may_send
from flows.estimates import memory_notes
from flows.graph import Pipeline
from flows.launching import cluster_problems_of
from flows.planning import PlannedStep
from registry.combinations import ONLINE
from registry.errors import InputError, Problem
from registry.home import Home
from registry.machine import machine_problems
from registry.models import MODELS
from tasks.devices import CPU_INFO, cuda_devices, require_bf16, slow_bf16
from tasks.fetch import count_usable_rows
from tasks.model import quantised_reason
from tasks.nodes import nodes_of_environment
from tasks.render import RowRenderer
from tasks.shared_store import shared_store
from tasks.steps import LocalFolder
from tasks.template import DEFAULT_DATE, Refusal, compile_template

RESERVE_BYTES = 100_000_000  # databases, logs, data steps
READ_BYTES = 64_000_000  # of data files; read in a few seconds. Of larger ones the fetch step says what is wrong


def bytes_needed(pipeline: Pipeline, lines: list[PlannedStep]) -> int:
    """About what the steps that will run write, in bytes; models of unknown size count as nothing."""
    sizes = {
        name: MODELS[stage.settings.model.model_name_or_path].size_bytes
        for name, stage in pipeline.stages.items()
        if stage.settings.model.model_name_or_path in MODELS
    }
    largest = max(sizes.values(), default=0)
    # fetched and converted; checkpoints and result; merged weights
    weights = {"model": 2.0, "train": 1.0, "merge": 1.0}
    needed = sum(weights.get(line.step.kind, 0.0) * largest for line in lines if not line.made)
    return int(needed) + RESERVE_BYTES


def preflight(pipeline: Pipeline, lines: list[PlannedStep], home: Home) -> list[str]:
    """Refuse to start what cannot end.

    Returns:
        What will work and not as one would like, a sentence each.

    Raises:
        InputError: a shared store that says no, too little disk, bf16 on a device without it, a template that does not
            compile, a method for which a package or device is missing, a base that is quantised already.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    store = shared_store()
    if store is not None:
        try:
            store.require_usable()
        except InputError as error:
            problems += error.problems
        store.tell(notes.append)
    if any(line.state != "cached" for line in lines):
        try:
            home.require_free(bytes_needed(pipeline, lines))
        except InputError as error:
            problems += error.problems
    for name, stage in pipeline.stages.items():
        here = stage.trained.cluster is None  # what a cluster's machines have is not known on this one
        if stage.settings.train.bf16 and here:
            try:
                require_bf16(cuda_devices(), f"stages.{name}.bf16")
            except InputError as error:
                problems += error.problems
            slow = None if cuda_devices() or not CPU_INFO.exists() else slow_bf16(CPU_INFO.read_text(encoding="utf-8"))
            notes += [f"stages.{name}.bf16: {slow}"] if slow else []
        if stage.settings.train.fsdp and here and not cuda_devices():
            rule = "fsdp needs CUDA devices: accelerate has it for no processor"
            problems.append(Problem(f"stages.{name}.fsdp", rule, "Use deepspeed, or remove it."))
        if stage.settings.train.fsdp and max(nodes_of_environment().count, stage.settings.train.nnodes or 1) > 1:
            rule = "fsdp on several machines is not there yet: their checkpoints would not be whole"
            problems.append(Problem(f"stages.{name}.fsdp", rule, "Use deepspeed, or one machine."))
        problems += _board_problems(f"stages.{name}.report_to", stage.settings.runtime.report_to)
        if stage.settings.runtime.preprocessing_dask and find_spec("distributed") is None:
            rule, cure = "the package distributed is not installed", "Install it: pip install 'llamatuner[dask]'"
            problems.append(Problem(f"stages.{name}.preprocessing_dask", rule, cure))
        installed = stage.settings.runtime.launcher == "kubernetes" or find_spec("deepspeed") is not None
        if stage.settings.train.deepspeed and stage.settings.train.stage not in ONLINE and not installed:
            cure = "pip install deepspeed"
            problems.append(Problem(f"stages.{name}.deepspeed", "the package deepspeed is not installed", cure))
    notes += memory_notes(lines)
    problems += _template_problems(lines) + _method_problems(pipeline, lines) + cluster_problems_of(lines)
    if problems:
        raise InputError(problems)
    return notes


def _board_problems(where: str, boards: tuple[str, ...]) -> list[Problem]:
    missing = [board for board in boards if find_spec(board) is None]
    problems = [Problem(where, f"the package {each} is not installed", f"pip install {each}") for each in missing]
    if "wandb" in boards and not missing and not wandb_may_send():
        cure = "Set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline."
        problems.append(Problem(where, "nobody is logged in to Weights & Biases", cure))
    return problems


def _method_problems(pipeline: Pipeline, lines: list[PlannedStep]) -> list[Problem]:
    """Settings that this machine lacks something for, and bases on this disk that cannot be trained on."""
    problems: list[Problem] = []
    made = {id(line.step) for line in lines if line.made}
    for name, stage in pipeline.stages.items():
        if id(stage.trained) in made:
            continue
        cuda = bool(cuda_devices()) or stage.trained.cluster is not None
        lacking = machine_problems(stage.settings.train.identity(), cuda)
        if stage.settings.runtime.launcher != "kubernetes":  # whose image has packages of its own
            problems += [Problem(f"stages.{name}", rule, cure) for rule, cure in lacking]
        base = stage.trained.inputs["base"].source
        reason = quantised_reason(base.path) if isinstance(base, LocalFolder) else None
        if reason:
            problems.append(Problem(f"stages.{name}.model_name_or_path", *reason))
    return problems


def require_rows(lines: list[PlannedStep]) -> None:
    """Read the rows that will be fetched, when they are few, so that bad ones are said before anything starts.

    Raises:
        InputError: as the fetch steps would, for all of them at once.
    """
    waiting = [line.step for line in lines if line.step.kind == "fetch" and not line.made]
    waiting = [step for step in waiting if not step.inputs]  # files that have to be downloaded first cannot be read now
    files = {Path(file) for step in waiting for files in step.runtime["files"] for file in files}
    if sum(path.stat().st_size for path in files) > READ_BYTES:
        return
    problems: list[Problem] = []
    for step in waiting:
        try:
            count_usable_rows(step)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(dict.fromkeys(problems), "data")


def _template_problems(lines: list[PlannedStep]) -> list[Problem]:
    """Of the templates that can be read now: given ones, and those of models on this disk."""
    problems: list[Problem] = []
    for line in lines:
        if line.step.kind != "render" or line.made:
            continue
        base = line.step.inputs["base"].source
        try:
            if isinstance(base, LocalFolder):
                template = RowRenderer(line.step.identity, base.path).template
                shape = template.shape if template else None
                if isinstance(shape, Refusal):
                    rule = f"no row can be trained on with it: {shape.detail} [{shape.reason}]"
                    problems.append(Problem("chat template", rule, "Use another one, see `llamatuner list templates`."))
            elif line.step.identity.get("template") is not None:
                compile_template(line.step.identity["template"], DEFAULT_DATE, "chat template")
        except InputError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))
