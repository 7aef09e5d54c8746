"""train and merge: shards + base → adapter or weights, and adapter + base → weights.

One decision: both are launched programs; here is only what goes into their keys and how their end is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry.combinations import ONLINE
from registry.method_records import EMBEDDINGS
from registry.reward_rules import code_file, is_code, short_name
from registry.stage_settings import StageSettings
from tasks.digests import sha256_file
from tasks.fetch import ROWS
from tasks.launch import ProgramFailed
from tasks.nodes import Nodes, nodes_of_environment, torchrun_is_forced
from tasks.steps import RESUME_FILE, Input, Step, Work, behind
from tasks.train.given import GIVEN, GIVEN_WEIGHTS, REWARD_MODEL

TRAIN_VERSION = 2  # an adapter belongs to weights, not to all files beside them
ONLINE_VERSION = 4  # rows lie in a line, norms' gradients are written out, all gradients' norm is that of each one's
MERGE_VERSION = 1  # first form
PROGRAMS = dict.fromkeys(ONLINE, "tasks.train.online.program")
"""Stage → its program, where that is not the one that trains on given rows."""
REWARD_FILES = ("*.safetensors", "*.json")
MODEL_STEPS = ("train", "merge", "add_tokens", "model")  # kinds of those that make a model
BASE_FILES = ("*.safetensors", "*.json", "*.jinja", "vocab*", "merges*", "tokenizer*")
TOO_LITTLE_MEMORY = (
    "One sequence at a time is too much for this memory. Lower cutoff_len or lora_rank, train fewer weights "
    "(finetuning_type: lora, quant_bit: 4), or use a smaller model."
)
TRAINING_RUNTIME = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "force_torchrun",
    "sample_steps",
}
DEFAULT_READING = {"template": None, "default_system": None, "enable_thinking": None, "control_tokens": "plain"}
"""How a reward model reads a conversation, where nothing else is known of it."""
SHARD_FILES = ("*.arrow", "state.json", "dataset_info.json")


def train_step(
    label: str,
    base_name: str,
    base: Input,
    shards: Step,
    settings: StageSettings,
    reference: Input | None = None,
    adapter: Input | None = None,
    held_out: Mapping[str, Step] | None = None,
    checkpoint: Input | None = None,
    rewards: Mapping[str, Input] | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Step:
    """The step that trains.

    The number of machines, of the environment or a cluster's, changes what a step holds, so it enters the key.

    Args:
        label: its name for people.
        base_name: the base's registry name, hub id or folder name, for the adapter's card.
        base: the model to start from.
        shards: the tokenize step of the training rows.
        settings: of the stage.
        reference: the model to stay close to; None: the one that is started from.
        adapter: a LoRA adapter to continue from.
        held_out: data set name → tokenize step of what is measured while training.
        checkpoint: of an earlier run, to go on from as `resume` of the settings says.
        rewards: `reward_model` or `reward_adapter`, which scores drawn answers.
        reading: how a `reward_model` with another tokenizer reads conversations; what is not in it is as in
            `DEFAULT_READING`.
    """
    inputs = {"base": Input(base.source, BASE_FILES), "shards": Input(shards, SHARD_FILES)}
    sets = held_out or {}
    inputs |= {f"held_out.{number}": Input(step, SHARD_FILES) for number, step in enumerate(sets.values())}
    inputs |= {"reference": Input(reference.source, BASE_FILES)} if reference else {}
    inputs |= {"adapter": adapter} if adapter else {}
    inputs |= {GIVEN if settings.model.resume == "exact" else GIVEN_WEIGHTS: checkpoint} if checkpoint else {}
    inputs |= _reward_inputs(rewards or {}, shards)
    code = {short_name(name): code_file(name, "reward_funcs") for name in settings.train.reward_funcs if is_code(name)}
    return Step(
        stage=settings.name,
        name="train",
        version=ONLINE_VERSION if settings.train.stage in ONLINE else TRAIN_VERSION,
        label=label,
        identity={
            "train": _identity(settings),
            "packing": shards.identity["packing"],
            "template": settings.template,
        }
        # how far positions are stretched
        | ({"cutoff_len": settings.data.cutoff_len} if settings.train.rope_scaling else {})
        | ({"reading": DEFAULT_READING | dict(reading or {})} if "rows" in inputs else {})
        | ({"reward_code": {name: sha256_file(file) for name, file in code.items()}} if code else {}),
        inputs=inputs,
        run="tasks.training:train",
        runtime=settings.runtime.model_dump(include=TRAINING_RUNTIME)
        | {"base_name": base_name, "sets": list(sets)}
        | ({"reward_files": {name: str(file) for name, file in code.items()}} if code else {}),
        devices=settings.train.nproc_per_node or 1,
        memory="tasks.training_estimate:device_memory",
    )


def _reward_inputs(rewards: Mapping[str, Input], shards: Step) -> dict[str, Input]:
    """What scores answers; a whole model may have a tokenizer of its own, and then reads the rows."""
    found = {name: Input(given.source, REWARD_FILES) for name, given in rewards.items()}
    return found | ({"rows": rows_of_prompts(shards)} if REWARD_MODEL in found else {})


def rows_of_prompts(shards: Step) -> Input:
    """The canonical rows that tokenized prompts were made of."""
    return Input(behind(shards, "rendered", "rows"), (f"{ROWS}/*", f"{ROWS}.json"))


def _identity(settings: StageSettings) -> dict[str, Any]:
    """The settings of the training; what is known of new tokens is in the embeddings, which LoRA leaves alone."""
    found = settings.train.identity()
    if found.get("additional_target") == [] and (settings.model.add_tokens or settings.model.add_special_tokens):
        found["additional_target"] = [EMBEDDINGS]
    nodes = nodes_of_environment()  # of a cluster's machines the settings say the number, and the environment nothing
    return found | ({"nnodes": nodes.count} if nodes.count > 1 else {})


def train(work: Work) -> dict[str, Any]:
    """Launch the training program; the template the rows were rendered with goes with what it makes.

    When memory runs out, the same global batch is made of smaller parts, down to one sequence, from the last checkpoint
    on: the loss does not depend on the parts. The size that fits is remembered for a later attempt.

    Raises:
        ProgramFailed: the program failed; out of memory with one sequence at a time as well.
    """
    settings, remembered = work.identity["train"], work.scratch / "micro_batch.json"
    spec = work.spec(base_digest=True)
    size = settings["per_device_train_batch_size"]
    size = _read(remembered)["micro_batch"] if remembered.exists() else size
    while True:
        spec.runtime["micro_batch"] = size
        try:
            module, processes, nodes = launch_of(work.step)
            work.run(module, spec, processes, nodes)
            break
        except ProgramFailed as error:
            if error.kind != "out_of_memory":
                raise
            smaller = next_smaller(size, settings["per_device_train_batch_size"])
            if smaller is None:
                raise ProgramFailed(error.kind, f"{error} {TOO_LITTLE_MEMORY}") from error
            work.note(f"out of memory with {size} sequences at a time: again with {smaller}, in the same global batch")
            size = smaller
            remembered.write_text(json.dumps({"micro_batch": size}), encoding="utf-8")
    if work.identity["template"] is not None:
        (work.output / "chat_template.jinja").write_text(work.identity["template"], encoding="utf-8")
    resume = work.output / RESUME_FILE
    resumed = json.loads(resume.read_text(encoding="utf-8"))["resumed_from"] if resume.exists() else None
    keep_log(work)
    return _read(work.output / "train.json") | {"resumed_from": resumed, "micro_batch": size}


def next_smaller(size: int, whole: int) -> int | None:
    """The largest part of at most half the size that the whole can be made of; None when it is one already.

    >>> [next_smaller(6, 6), next_smaller(3, 6), next_smaller(1, 6)]
    [3, 1, None]
    """
    return next((part for part in range(size // 2, 0, -1) if whole % part == 0), None)


def nodes_for(settings: dict[str, Any], forced: bool, cluster: bool = False) -> Nodes | None:
    """The machines that train, where torchrun has to start the program; None where one plain process does.

    Args:
        settings: `TrainSettings.identity()`.
        forced: use torchrun in any case.
        cluster: they are a cluster's, which deals out their numbers.
    """
    nodes = Nodes(settings.get("nnodes", 1)) if cluster else nodes_of_environment()
    alone = settings["nproc_per_node"] == nodes.count == 1 and "deepspeed" not in settings and "fsdp" not in settings
    return None if alone and not (forced or torchrun_is_forced()) else nodes


def launch_of(step: Step) -> tuple[str, int, Nodes | None]:
    """The module that trains, the processes of each machine, and the machines."""
    settings, cluster = step.identity["train"], step.cluster is not None
    nodes = nodes_for(settings, step.runtime["force_torchrun"], cluster)
    return PROGRAMS.get(settings["stage"], "tasks.train.program"), settings["nproc_per_node"], nodes


def merge_step(stage: str, label: str, base: Input, adapter: Input, name: str = "merge") -> Step:
    """The step that merges an adapter into its base."""
    return Step(
        stage=stage,
        name=name,
        version=MERGE_VERSION,
        label=label,
        identity={},
        inputs={"base": Input(base.source, BASE_FILES), "adapter": adapter},
        run="tasks.training:merge",
        devices=1,
    )


def merge(work: Work) -> dict[str, Any]:
    """Launch the merge program."""
    work.run("tasks.merge_program", work.spec(base_digest=True))
    keep_log(work)
    return _read(work.output / "merge.json")


def keep_log(work: Work) -> None:
    """Keep the program's log with the artifact."""
    report = work.output / "report"
    report.mkdir(exist_ok=True)
    (report / "program.log").write_bytes((work.folder / "program.log").read_bytes())


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
