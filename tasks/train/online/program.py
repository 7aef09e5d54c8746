"""The program of stages ppo, grpo and rloo: reads a spec, makes the steps that are not made yet, writes the artifact.

One decision: it is a loop of its own, without transformers' Trainer: what is a step there, one batch and one loss, is
here drawing, scoring and many updates of two models.

Run as `python -m tasks.train.online.program SPEC.json`, or on several processes with `torchrun`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.deepspeed import zero_stage
from registry.reward_rules import is_code
from tasks.program import OPTIONAL, Events, Spec, main
from tasks.train.program import CHECKPOINTS, make_deterministic, make_plan, optional_packages, require_cuda_for

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from tasks.train.online.loop import Loop, Processes, Words
    from tasks.train.online.moved import Moved
    from tasks.train.online.roles import Roles


def work(spec: Spec, events: Events) -> None:
    """Train what the spec says.

    Raises:
        ProgramError: `bad_setting` for what cannot be trained, `not_finite` for a run that fell apart, `killed` when it
            was asked to end early.
    """
    settings = spec.settings["train"]
    events.note("loading libraries")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, before its first use
    make_deterministic(settings["seed"])
    from tasks.train.measure import resident_bytes
    from tasks.train.model import position_changes
    from tasks.train.online.journal import Journal
    from tasks.train.online.roles import make_roles

    before = resident_bytes()
    require_cuda_for(settings)
    arguments = _arguments(settings)  # first: they join the processes, and make accelerate forget an accelerator
    ranks = _processes(settings)
    events.note("loading models")
    changes = position_changes(settings, spec.inputs["base"], spec.settings.get("cutoff_len"))
    roles = make_roles(spec, changes, events.note)
    record = {"base_digest": spec.settings["base_digest"]} | ({"config": changes} if changes else {})
    moved = _moved(settings, roles, arguments, ranks)
    loop = _loop(spec, roles, moved, ranks)
    total = loop.plan.total_steps(settings.get("max_steps"), settings.get("num_train_epochs"))
    for sentence in (roles.sentence(), f"{loop.plan.sentence(total)}; {_sizes(settings, ranks.count)}"):
        if ranks.index == 0:
            print(sentence, flush=True)
        events.note(sentence)
    journal = Journal(spec, events, ranks, Path(spec.scratch) / CHECKPOINTS, moved, total, record)
    loop.numbers = journal.resume(loop.numbers)
    rate = _schedule(settings, total)
    while loop.numbers.step < total:
        factor = rate(loop.numbers.step)
        _set_rates(settings, moved, factor)
        metrics, experience = loop.step()
        journal.add(loop, metrics, experience, settings["learning_rate"] * factor)
        journal.keep(loop.numbers)
    if journal.resumed_from < total:
        _write_memory(spec, loop, before)
    if ranks.accelerator.is_local_main_process:
        journal.write(roles, loop)


def _write_memory(spec: Spec, loop: Loop, before: int) -> None:
    """Write what this run took, of the process that took most, beside what was estimated.

    Args:
        spec: of the run.
        loop: whose steps are made.
        before: bytes of this process with all libraries loaded, before there was a model.
    """
    import torch

    from tasks.train.measure import peak_bytes, peak_gib
    from tasks.train.output import write_json
    from tasks.training_estimate import MEMORY_FILE, taken

    most = max(loop.ranks.everybodys({loop.ranks.index: peak_bytes() - before}))
    found = taken(spec, loop.update.micro_batch, peak_gib(most), torch.cuda.is_available())
    if loop.ranks.accelerator.is_local_main_process:
        file = Path(spec.output) / MEMORY_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)


def _sizes(settings: dict[str, Any], processes: int) -> str:
    size = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes
    return f"{settings['ppo_epochs']} passes over a step's answers in mini-batches of {size}"


def _processes(settings: dict[str, Any]) -> Processes:
    """The processes of this run, joined."""
    import torch
    from accelerate import Accelerator

    from tasks.train.online.loop import Processes
    from tasks.train.processes import count_processes

    count_processes(settings)
    precision = "bf16" if settings["bf16"] else "no"
    return Processes(Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available()))


def _moved(settings: dict[str, Any], roles: Roles, arguments: TrainingArguments, ranks: Processes) -> dict[str, Moved]:
    """What is trained, and by what; matrices decay, norms and biases do not."""
    from transformers import Trainer

    from tasks.train.online.moved import Moved, MovedAtOnce, find_owners

    stage = zero_stage(settings["deepspeed"]) if "deepspeed" in settings and ranks.count > 1 else 0
    make, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    trained = {"policy": {name: value for name, value in roles.policy.named_parameters() if value.requires_grad}}
    if roles.critic is not None:
        trained["critic"] = roles.critic.parameters()
    moved = {}
    for role, parameters in trained.items():
        owners = find_owners(parameters, ranks.count) if stage else None
        own = [value for name, value in parameters.items() if owners is None or owners[name] == ranks.index]
        decays = ((True, settings["weight_decay"]), (False, 0.0))
        groups = [{"params": [p for p in own if (p.ndim > 1) == matrix], "weight_decay": d} for matrix, d in decays]
        # one that moves nothing is given no parameters: an optimizer wants a group
        groups = [group for group in groups if group["params"]] or groups
        optimizer = make(groups, **keywords)
        moved[role] = (MovedAtOnce if stage == 2 else Moved)(parameters, optimizer, ranks, owners)
    return moved


def _loop(spec: Spec, roles: Roles, moved: dict[str, Moved], ranks: Processes) -> Loop:
    from tasks.train.batches import Rows
    from tasks.train.online.loop import Loop
    from tasks.train.online.roles import learning
    from tasks.train.online.sources import find_sources
    from tasks.train.online.state import Numbers
    from tasks.train.online.update import Update

    settings = spec.settings["train"]
    rows = Rows(spec.inputs["shards"], roles.policy.get_input_embeddings().num_embeddings)
    micro_batch = spec.runtime.get("micro_batch", settings["per_device_train_batch_size"])
    plan = make_plan(settings, len(rows), micro_batch)
    if spec.runtime.get("gradient_checkpointing", False):
        for model in learning(roles.policy, roles.critic):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    update = Update(roles, moved, settings, micro_batch, ranks)
    sources = find_sources(settings, spec.runtime.get("reward_files", {}))
    numbers = Numbers(kl_coef=settings["kl_coef"])
    return Loop(roles, rows, plan, _words(spec), sources, update, ranks, settings, numbers)


def _words(spec: Spec) -> Words:
    """Tokenizer and terminators, those of the template among them."""
    from tasks.answers import stop_ids
    from tasks.template import ChatTemplate
    from tasks.tokens import load_tokenizer
    from tasks.train.online.loop import Words

    folder = Path(spec.inputs["base"])
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate.from_folder(folder, spec.settings["template"], {}, None)
    stops = stop_ids(folder, tokenizer, template.terminator)
    return Words(tokenizer, stops, pad=min(stops, default=0))


def _arguments(settings: dict[str, Any]) -> TrainingArguments:
    """What transformers needs to know to make an optimizer, and to join the processes."""
    import torch
    from transformers import TrainingArguments

    from tasks.train.processes import process_arguments

    alone = {name: value for name, value in settings.items() if name != "deepspeed"}  # it is divided here, by `moved`
    how = process_arguments(alone, cpu=not torch.cuda.is_available())
    return TrainingArguments(optim=settings["optim"], learning_rate=settings["learning_rate"], report_to="none", **how)


def _schedule(settings: dict[str, Any], total: int) -> Any:
    """Steps made → factor of the learning rates."""
    import torch
    from transformers import get_scheduler

    from tasks.train.program import warmup_steps

    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return get_scheduler(settings["lr_scheduler_type"], nothing, warmup_steps(settings, total), total).lr_lambdas[0]


def _set_rates(settings: dict[str, Any], moved: dict[str, Moved], factor: float) -> None:
    for role, who in moved.items():
        peak = settings["critic_learning_rate" if role == "critic" else "learning_rate"]
        for group in who.optimizer.param_groups:
            group["lr"] = peak * factor


def _work_and_part(spec: Spec, events: Events) -> None:
    """Train, then take leave of the other processes."""
    work(spec, events)
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def needed_packages(spec: Spec) -> set[str]:
    """Which of `tasks.program.OPTIONAL` it needs: what training does, and all of them for code of the user's."""
    own = any(is_code(name) for name in spec.settings["train"]["reward_funcs"])
    return set(OPTIONAL) if own else optional_packages(spec) - {"deepspeed"}


if __name__ == "__main__":
    main(_work_and_part, needed_packages)
