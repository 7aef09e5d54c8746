"""The program that trains: reads a spec, moves weights, writes the artifact.

One decision: heavy libraries are imported after the first event, so that whoever watches sees within a fraction of a
second that something has begun.

Run as `python -m tasks.train.program SPEC.json`, or on several processes with `torchrun … -m tasks.train.program`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.machine import machine_problems
from registry.optimizers import OPTIMIZERS
from registry.stages import METHODS, STAGES
from tasks.program import Events, ProgramError, Spec, main
from tasks.train.given import GIVEN, GIVEN_WEIGHTS, LINES

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from tasks.batch_plan import BatchPlan
    from tasks.train.batches import Rows
    from tasks.train.callbacks import StepLines, StepWatcher
    from tasks.train.held_out import HeldOutLoss
    from tasks.train.trainer import TokenTrainer

CHECKPOINTS = "checkpoints"


def work(spec: Spec, events: Events) -> None:
    """Train what the spec says.

    Raises:
        ProgramError: `bad_setting` for what cannot be trained, `not_finite` for a run that fell apart.
    """
    settings = spec.settings["train"]
    STAGES.lookup(settings["stage"], "stage")
    METHODS.lookup(settings["finetuning_type"], "finetuning_type")
    events.note("loading libraries")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, before its first use
    make_deterministic(settings["seed"])
    import tasks.train.held_out  # noqa: F401 - with all that it loads, before memory is looked at
    from tasks.train.batches import Rows
    from tasks.train.measure import resident_bytes
    from tasks.train.model import build_model, position_changes, require_separation
    from tasks.train.output import write_json
    from tasks.train.processes import whole_weights
    from tasks.train.resuming import load_weights
    from tasks.training_estimate import MEMORY_FILE

    before = resident_bytes()
    events.note("loading model")
    require_cuda_for(settings)
    base, digest = spec.inputs["base"], spec.settings["base_digest"]
    changes = position_changes(settings, base, spec.settings.get("cutoff_len"))
    model = build_model(settings, base, digest, spec.inputs.get("adapter"), changes, events.note)
    record = {"base_digest": digest} | ({"config": changes} if changes else {})
    if GIVEN_WEIGHTS in spec.inputs:
        _require_base(spec, GIVEN_WEIGHTS, digest, changes, events)
        load_weights(model, Path(spec.inputs[GIVEN_WEIGHTS]))
        events.note(f"the weights of {spec.inputs[GIVEN_WEIGHTS]}; step 0, with a new optimizer")
    elif GIVEN in spec.inputs:
        _require_base(spec, GIVEN, digest, changes, events)
    pieces = 2 if STAGES[settings["stage"]].shape == "preference" else 1
    rows = Rows(spec.inputs["shards"], model.get_input_embeddings().num_embeddings, pieces)
    if spec.settings["packing"]:
        require_separation(model, settings)
    plan = make_plan(settings, len(rows), spec.runtime.get("micro_batch", settings["per_device_train_batch_size"]))
    total = plan.total_steps(settings.get("max_steps"), settings.get("num_train_epochs"))
    use_cache = model.config.use_cache
    trainer = _trainer(spec, model, rows, plan, total, changes)
    if trainer.args.process_index == 0:
        print(plan.sentence(total), flush=True)
    events.note(plan.sentence(total))
    lines, resumed_from = _train(trainer, spec, events, total, record)
    memory = _memory(trainer, spec, plan, before) if resumed_from < total else None
    model.config.use_cache = use_cache
    first = trainer.args.local_process_index == 0
    with whole_weights(trainer.model, keep=first):
        if first:
            _write(trainer.model, spec, lines, plan, resumed_from, record)
            if memory:
                write_json(Path(spec.output) / MEMORY_FILE, memory)


def _memory(trainer: TokenTrainer, spec: Spec, plan: BatchPlan, before: int) -> dict[str, Any]:
    """What this run took, of the process that took most, beside what was estimated.

    Args:
        trainer: whose steps are made.
        spec: of the run.
        plan: the batches.
        before: bytes of this process with all libraries loaded, before there was a model.
    """
    import torch

    from tasks.train.measure import peak_bytes, peak_gib
    from tasks.training_estimate import taken

    most = float(trainer.gather(torch.tensor([peak_bytes() - before], device=trainer.args.device)).max())
    return taken(spec, plan.per_device, peak_gib(most), torch.cuda.is_available())


def _trainer(spec: Spec, model: Any, rows: Rows, plan: BatchPlan, total: int, changes: dict[str, Any]) -> TokenTrainer:
    """The trainer with the objective of the stage, its reference and its batches."""
    from functools import partial

    from tasks.train.batches import collate
    from tasks.train.compared import MarkedRows
    from tasks.train.model import make_reference
    from tasks.train.objectives import COLLATES, make_objective
    from tasks.train.trainer import TokenTrainer

    settings = spec.settings["train"]
    stage = settings["stage"]
    reference = make_reference(settings, model, spec.inputs["base"], spec.inputs.get("reference"), changes)
    return TokenTrainer(
        model,
        _arguments(spec, plan, total),
        MarkedRows(rows, plan) if stage == "kto" else rows,
        plan,
        make_objective(settings, reference),
        COLLATES.get(stage) or partial(collate, packing=spec.settings["packing"]),
        settings.get("loraplus_lr_ratio"),
    )


def require_cuda_for(settings: dict[str, Any]) -> None:
    """Refuse what this machine has no device or package for.

    Raises:
        ProgramError: `bad_setting`.
    """
    import torch

    for problem in machine_problems(settings, torch.cuda.is_available()):
        raise ProgramError("bad_setting", ". ".join(problem))


def warmup_steps(settings: dict[str, Any], total: int) -> int:
    """Optimizer steps over which the learning rate rises; a share of all of them is rounded up.

    >>> warmup_steps({"warmup_ratio": 0.03}, 10), warmup_steps({"warmup_steps": 4}, 10)
    (1, 4)

    Raises:
        ProgramError: `bad_setting` for so many that the learning rate never comes to its peak.
    """
    steps: int = settings.get("warmup_steps", 0) or math.ceil(total * settings.get("warmup_ratio", 0.0))
    if settings.get("warmup_steps", 0) >= total:
        rule = (
            f"warmup_steps is {steps}, and there are {total} optimizer steps: the learning rate never comes to its peak"
        )
        raise ProgramError("bad_setting", f"{rule}. Use fewer, or warmup_ratio.")
    return steps


def make_deterministic(seed: int) -> None:
    """Seed everything, and use deterministic kernels."""
    import torch
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_seed(seed)
    # Only warns where no deterministic kernel exists; filling fresh memory is a debugging aid that costs time.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def make_plan(settings: dict[str, Any], rows: int, micro_batch: int) -> BatchPlan:
    """The batch arithmetic of the processes that are there, see `BatchPlan.of`."""
    from tasks.batch_plan import BatchPlan
    from tasks.train.processes import count_processes

    return BatchPlan.of(settings, rows, micro_batch, count_processes(settings))


def _arguments(spec: Spec, plan: BatchPlan, total: int) -> TrainingArguments:
    """Trainer's arguments: its own logging, saving of extras, progress bars and reporting are off."""
    import torch
    from transformers import TrainingArguments

    from tasks.train.processes import process_arguments

    settings, cpu = spec.settings["train"], not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(Path(spec.scratch) / CHECKPOINTS),
        per_device_train_batch_size=plan.per_device,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=settings["learning_rate"],
        max_steps=total,
        lr_scheduler_type=settings["lr_scheduler_type"],
        warmup_steps=warmup_steps(settings, total),
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        seed=settings["seed"],
        bf16=settings["bf16"],
        optim=settings["optim"],
        optim_target_modules="all-linear" if OPTIMIZERS[settings["optim"]].whole_matrices else None,
        neftune_noise_alpha=settings["neftune_noise_alpha"],
        activation_checkpointing=spec.runtime.get("gradient_checkpointing", False),
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=settings["enable_liger_kernel"],
        # the losses here are our own, over the trained positions only
        liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.runtime["save_steps"],
        save_total_limit=None,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        **process_arguments(settings, cpu),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process uses one GPU; Trainer would wrap more in DataParallel
    return arguments


def _require_base(spec: Spec, name: str, digest: str, changes: dict[str, Any], events: Events) -> None:
    """Refuse the checkpoint of an adapter that belongs to another base."""
    from tasks.train.resuming import require_same_base

    adapter = spec.settings["train"]["finetuning_type"] == "lora"
    note = require_same_base(Path(spec.inputs[name]), adapter, digest, changes)
    if note:
        events.note(note)


def _starting_point(
    trainer: Any, spec: Spec, own: Path | None, total: int, first: bool
) -> tuple[Path | None, int, int]:
    """Where the run goes on: the checkpoint, its step, and the step before the first line that is known.

    A checkpoint of its own is newer than the one that was given. Lines that the given one knows become the run's own.
    """
    from tasks.train.checkpoints import step_of
    from tasks.train.given import read_step
    from tasks.train.resuming import require_exact

    given = Path(spec.inputs[GIVEN]) if GIVEN in spec.inputs else None
    if given is None:
        return own, (step_of(own) or 0) if own else 0, 0
    known = given / LINES
    begin = 0 if known.is_file() else read_step(given)
    if own:
        return own, step_of(own) or 0, begin
    step = require_exact(given, spec.settings["train"], trainer, total)
    if first and known.is_file():
        shutil.copyfile(known, Path(spec.scratch) / LINES)
    return given, step, begin


def _train(
    trainer: Any, spec: Spec, events: Events, total: int, record: dict[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    """Make the steps that are not made yet; the line of every step, and the step resumed from (0: none)."""
    from transformers import PrinterCallback

    from tasks.architecture import read_architecture
    from tasks.train.callbacks import CheckpointKeeper, Leaving, StepLines, StepWatcher
    from tasks.train.checkpoints import remove_damaged
    from tasks.train.measure import StepSpeed
    from tasks.train.processes import newest_common, required_here
    from tasks.train.resuming import load_weights

    root, required = Path(spec.scratch) / CHECKPOINTS, required_here(spec.settings["train"], trainer.args.world_size)
    first = trainer.args.local_process_index == 0
    if first:
        for reason in remove_damaged(root, required):
            events.note(reason)
    own = newest_common(root, required)
    checkpoint, step, begin = _starting_point(trainer, spec, own, total, first)
    if step:
        where = "" if own else f" of {checkpoint}"
        events.note(f"resumed from step {step}{where}")
    lines = StepLines(Path(spec.scratch) / LINES if first else None, step, begin)
    settings, model = spec.settings["train"], read_architecture(Path(spec.inputs["base"]))
    speed = StepSpeed(model, settings, trainer.args.world_size)
    watcher = StepWatcher(events, lines, trainer, spec.runtime["logging_steps"], speed)
    watcher.repeat()
    trainer.remove_callback(PrinterCallback)
    best = settings.get("metric_for_best_model") if settings.get("load_best_model_at_end") else None
    trainer.add_callback(CheckpointKeeper(root, spec.runtime["save_total_limit"], lines, required, record, best))
    trainer.add_callback(watcher)
    leaving = Leaving(trainer)
    trainer.add_callback(leaving)
    held_out = _held_out(trainer, spec, events, lines, watcher)
    if held_out:
        trainer.add_callback(held_out)
    if checkpoint and (step == total or (held_out and held_out.is_over())):
        # Trainer would make one step too many: it only looks whether it is done after a step.
        load_weights(trainer.model, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    leaving.require_end(trainer.state.global_step, total)
    if held_out and held_out.keep_best:
        held_out.load_best(root)
    return lines.lines, step


def _held_out(
    trainer: TokenTrainer, spec: Spec, events: Events, lines: StepLines, watcher: StepWatcher
) -> HeldOutLoss | None:
    """What measures the held-out sets while training; None where nothing is to be measured."""
    from tasks.batch_plan import BatchPlan
    from tasks.train.batches import Rows
    from tasks.train.compared import MarkedRows
    from tasks.train.held_out import HeldOutLoss, HeldOutSet

    names = spec.runtime.get("sets", [])
    model: Any = trainer.model
    vocabulary, sets = model.get_input_embeddings().num_embeddings, []
    for number, name in enumerate(names):
        rows = Rows(spec.inputs[f"held_out.{number}"], vocabulary, trainer.objective.pieces)
        size = spec.runtime["per_device_eval_batch_size"]
        plan = BatchPlan(len(rows), size, 1, trainer.args.world_size, trainer.args.seed)
        marked = spec.settings["train"]["stage"] == "kto"
        sets.append(HeldOutSet(name, MarkedRows(rows, plan) if marked else rows, plan))
    return HeldOutLoss(trainer, sets, events, lines, watcher, spec.settings["train"]) if sets else None


def _write(
    model: Any, spec: Spec, lines: list[dict[str, Any]], plan: BatchPlan, resumed_from: int, record: dict[str, Any]
) -> None:
    from tasks.train.callbacks import EVAL_LOSS, logged
    from tasks.train.curve import draw_curve
    from tasks.train.output import summary, write_artifact, write_json

    output, report = Path(spec.output), Path(spec.output) / "report"
    write_artifact(
        model,
        output,
        Path(spec.inputs["base"]),
        spec.runtime.get("base_name", ""),
        record,
        spec.settings["train"],
        summary(lines, plan.steps_per_epoch(), spec.settings["train"].get("metric_for_best_model", EVAL_LOSS)),
    )
    report.mkdir(parents=True, exist_ok=True)
    shown = logged(lines, spec.runtime["logging_steps"])
    (report / LINES).write_text("".join(json.dumps(line) + "\n" for line in shown), encoding="utf-8")
    draw_curve(shown, report / "loss.png", title=spec.runtime.get("base_name", ""))
    if resumed_from:
        write_json(report / "resume.json", {"resumed_from": resumed_from})


def _work_and_part(spec: Spec, events: Events) -> None:
    """Train, then take leave of the other processes."""
    work(spec, events)
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def optional_packages(spec: Spec) -> set[str]:
    """Which of `tasks.program.OPTIONAL` training needs: for quantised weights, for the optimizer, for DeepSpeed."""
    settings = spec.settings["train"]
    found = {OPTIMIZERS[settings["optim"]].package}
    found |= {"bitsandbytes"} if settings.get("quant_bit") else set()
    found |= {"deepspeed"} if settings.get("deepspeed") else set()
    return {name for name in found if name}


if __name__ == "__main__":
    main(_work_and_part, optional_packages)
