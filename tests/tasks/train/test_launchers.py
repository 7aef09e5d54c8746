"""DistributedDataParallel, DeepSpeed and several machines: real processes, on a tiny model, with the numbers of one.

One decision: all runs of two processes are made in one start (`tests.tasks.train.several`), because importing torch
costs more than they do; runs of one process are made in this one.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from registry.records import TrainSettings
from tasks.launch import ProgramFailed, run_program
from tasks.nodes import Nodes
from tasks.program import Events, ProgramError, Spec
from tasks.train.checkpoints import required_files
from tasks.train.processes import count_processes, process_arguments
from tasks.train.program import work
from tasks.training_estimate import MEASURED
from tests.tasks.train.online import runs as ppo
from tests.tiny import random_pairs, random_rows, read_lines, tiny_model, write_shards, write_spec

torch.set_num_threads(1)
STEPS = 4
KILLED: dict[str, Any] = {"max_steps": 20, "finetuning_type": "lora"}
SHORT: dict[str, Any] = {"per_device_train_batch_size": 1, "num_train_epochs": 2.0, "max_steps": None, "save_steps": 2}
PPO: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "ppo_buffer_size": 2, "ppo_score_norm": True}
UNEVEN: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 5, "micro_batch": 2, "learning_rate": 1e-4}
RUNS = [
    *((stage, method, launcher) for stage, method in (("sft", "lora"), ("sft", "full"), ("dpo", "lora"))
      for launcher in ("ddp", "zero2", "zero3")),
    ("rm", "lora", "zero3"),
    ("kto", "full", "zero3"),
    ("sft", "full", "zero0"),
    ("sft", "full", "zero1"),
]  # fmt: skip


class Runs:
    """Where the runs lie, and what they begin with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny_model(folder / "base")
        marks = [number % 3 != 0 for number in range(6)]
        pairs = write_shards(folder / "pairs", random_pairs(6), "preference")  # the second step is short: 4 and 2 rows
        self.shards = dict.fromkeys(("dpo", "rm", "orpo"), pairs) | {
            "sft": write_shards(folder / "rows", random_rows(6)),
            "kto": write_shards(folder / "marked", random_rows(6), "labelled", marks),
            "short": write_shards(folder / "ten", random_rows(10)),  # 4 + 4 + 2 rows an epoch
        }

    def spec(self, name: str, stage: str, save_steps: int = 100, shards: str = "", **fields: Any) -> Path:
        """The spec of a run."""
        fields = {"max_steps": STEPS, "learning_rate": 1e-2, "stage": stage} | fields
        nodes = {"nnodes": fields.pop("nnodes")} if "nnodes" in fields else {}
        inputs = {"base": self.base, "shards": self.shards[shards or stage]}
        inputs |= {"checkpoint": fields.pop("checkpoint")} if "checkpoint" in fields else {}
        settings = {"train": TrainSettings(**fields).identity() | nodes, "packing": False, "base_digest": "base-0"}
        runtime = {"logging_steps": 1, "save_steps": save_steps, "save_total_limit": 2, "base_name": "tiny"}
        return write_spec(self.folder / name, settings, inputs, runtime)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The line of every step of a run."""
        return read_lines(self.folder / name / "scratch" / "metrics.jsonl")

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """What a run saved."""
        (file,) = (self.folder / name / "output").glob("*.safetensors")
        return load_file(file)


def launch(spec: Path, module: str = "tasks.train.program", **arguments: Any) -> None:
    """Run a program as the task does."""
    run_program(module, Spec.read(spec), spec.parent, arguments.pop("on_event", lambda event: None), **arguments)


def files(folder: Path) -> dict[str, bytes]:
    """All files of an artifact but those of report/."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One run of every stage and method on one process, and of every launcher on two, of the same global batch."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    made = Runs(tmp_path_factory.mktemp("launchers"))
    for stage, method in dict.fromkeys((stage, method) for stage, method, _ in RUNS):
        fields = {"finetuning_type": method, "gradient_accumulation_steps": 4}
        spec = Spec.read(made.spec(f"{stage}-{method}-one", stage, **fields))
        work(spec, Events(spec.events))
    short = Spec.read(made.spec("short-one", "sft", shards="short", **SHORT, gradient_accumulation_steps=4))
    work(short, Events(short.events))
    specs = []
    for stage, method, launcher in RUNS:
        fields = {"finetuning_type": method, "gradient_accumulation_steps": 2, "nproc_per_node": 2}
        fields |= {} if launcher == "ddp" else {"deepspeed": launcher}
        specs.append(str(made.spec(f"{stage}-{method}-{launcher}", stage, **fields)))
    pair = {"nproc_per_node": 2, "finetuning_type": "lora", "save_steps": 2}
    specs.append(str(made.spec("whole", "sft", **KILLED | pair)))
    specs += [str(made.spec("again", "sft", deepspeed="zero3", **pair))] * 2
    pair = {"nproc_per_node": 2, "gradient_accumulation_steps": 2}
    specs += [str(made.spec("short-two", "sft", shards="short", **SHORT, **pair))] * 2
    pair["checkpoint"] = made.folder / "short-two" / "scratch" / "checkpoints" / "checkpoint-4"
    specs.append(str(made.spec("short-given", "sft", shards="short", **SHORT, **pair)))
    ppo.train(made.folder / "ppo-one", {"base": made.base}, **PPO, gradient_accumulation_steps=2)
    specs += [str(ppo.make_spec(made.folder / "ppo-two", {"base": made.base}, **PPO, nproc_per_node=2))] * 2
    for way in ("zero1", "zero2"):  # each is named twice: the second one goes on from a checkpoint
        pair = {"nproc_per_node": 2, "deepspeed": way}
        specs += [str(ppo.make_spec(made.folder / f"ppo-{way}", {"base": made.base}, **PPO, **pair))] * 2
    for name, fields in (("plain", {}), ("zero2", {"deepspeed": "zero2"})):
        fields |= {"nproc_per_node": 2, "finetuning_type": "full"}
        specs.append(str(ppo.make_spec(made.folder / f"uneven-{name}", {"base": made.base}, **UNEVEN, **fields)))
    several = write_spec(made.folder / "several", {"specs": specs}, {}, {})
    launch(several, "tests.tasks.train.several", processes=2, deadline=600)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "method", "launcher"), RUNS, ids=["-".join(run) for run in RUNS])
def test_two_processes_have_the_losses_and_weights_of_one(runs: Runs, stage: str, method: str, launcher: str) -> None:
    name = f"{stage}-{method}"
    one, two = runs.lines(f"{name}-one"), runs.lines(f"{name}-{launcher}")
    assert len(two) == STEPS
    for line, wanted in zip(two, one, strict=True):
        for value in set(wanted) - set(MEASURED) - ({"grad_norm"} if launcher == "zero0" else set()):
            assert line[value] == pytest.approx(wanted[value], rel=2e-4, abs=1e-5), (value, line["step"])
    saved, wanted_weights = runs.weights(f"{name}-{launcher}"), runs.weights(f"{name}-one")
    assert saved.keys() == wanted_weights.keys()
    for weight, tensor in saved.items():
        assert tensor.dtype == wanted_weights[weight].dtype
        torch.testing.assert_close(tensor, wanted_weights[weight], rtol=1e-3, atol=1e-3)
    files = [runs.folder / f"{name}-{way}" / "output" / "train.json" for way in ("one", launcher)]
    one_file, other = (json.loads(file.read_text()) for file in files)
    for count in ("trainable_parameters", "all_parameters", "trained_parameters"):
        assert one_file[count]
        assert one_file[count] == other[count]


@pytest.mark.slow
def test_a_run_with_a_killed_rank_ends_at_once_and_is_resumed_to_the_same_bytes(runs: Runs) -> None:
    spec = runs.spec("killed", "sft", nproc_per_node=2, save_steps=2, **KILLED)
    died: list[float] = []

    def kill_the_second_rank(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["step"] >= 3 and not died:
            for child in psutil.Process().children(recursive=True):
                if str(spec) in child.cmdline() and child.environ().get("RANK") == "1":
                    child.kill()
                    died.append(time.monotonic())

    with pytest.raises(ProgramFailed, match="rank 1 was ended by signal 9") as caught:
        launch(spec, processes=2, on_event=kill_the_second_rank)
    assert time.monotonic() - died[0] < 20
    assert caught.value.retried
    notes: list[str] = []
    launch(spec, processes=2, on_event=lambda event: notes.append(event.get("text", "")))
    resumed = [text for text in notes if text.startswith("resumed from step")]
    assert len(resumed) == 1
    assert files(runs.folder / "killed" / "output") == files(runs.folder / "whole" / "output")


@pytest.mark.slow
def test_a_short_step_is_divided_as_one_process_does_it_and_a_run_with_it_is_resumed(runs: Runs) -> None:
    one, two = runs.lines("short-one"), runs.lines("short-two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert len(two) == 6
    outputs = [runs.folder / name for name in ("short-one/output", "short-two/output", "short-two/output-before")]
    tokens = [json.loads((output / "train.json").read_text())["trained_tokens"] for output in outputs]
    assert tokens[0] == tokens[1] == tokens[2]
    assert files(outputs[1]) == files(outputs[2]) == files(runs.folder / "short-given" / "output")
    assert json.loads((outputs[1] / "report" / "resume.json").read_text()) == {"resumed_from": 4}
    steps = [e["step"] for e in read_lines(runs.folder / "short-two" / "events.jsonl") if e["kind"] == "progress"]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6]  # told once, by the first process


@pytest.mark.slow
def test_two_processes_draw_score_and_learn_as_one_does(runs: Runs) -> None:
    one, two = (ppo.lines(runs.folder / name) for name in ("ppo-one", "ppo-two"))
    assert len(two) == 6
    for line, wanted in zip(two, one, strict=True):
        assert line == pytest.approx(wanted, rel=2e-2, abs=2e-3)
    samples = [
        read_lines(runs.folder / name / "output" / "report" / "samples.jsonl") for name in ("ppo-one", "ppo-two")
    ]
    assert [row["answer"] for row in samples[0]] == [row["answer"] for row in samples[1]]
    output = runs.folder / "ppo-two" / "output"
    assert json.loads((output / "report" / "resume.json").read_text()) == {"resumed_from": 2}
    assert files(output) == files(output.with_name("output-before"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero1", "zero2"])
def test_a_divided_state_gives_the_bytes_of_one_that_is_not_and_is_resumed(runs: Runs, way: str) -> None:
    output = runs.folder / f"ppo-{way}" / "output"
    assert ppo.lines(runs.folder / f"ppo-{way}") == ppo.lines(runs.folder / "ppo-two")
    weights = [path.name for path in output.glob("*.safetensors")]
    assert len(weights) == 1
    assert files(output)[weights[0]] == files(runs.folder / "ppo-two" / "output")[weights[0]]
    assert json.loads((output / "report" / "resume.json").read_text()) == {"resumed_from": 2}
    assert files(output) == files(output.with_name("output-before"))
    checkpoint = runs.folder / f"ppo-{way}" / "scratch" / "checkpoints" / "checkpoint-4"
    whole, *parts = (
        {name: value.numel() for name, value in load_file(path).items() if value.ndim}
        for path in (
            runs.folder / "ppo-two" / "scratch" / "checkpoints" / "checkpoint-4" / "optimizer.policy.safetensors",
            *(checkpoint / f"optimizer.policy-{rank}.safetensors" for rank in (0, 1)),
        )
    )
    assert sum(map(len, parts)) == len(whole)
    assert sum(sum(part.values()) for part in parts) == sum(whole.values())
    assert max(sum(part.values()) for part in parts) < 0.55 * sum(whole.values())


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_micro_batches_divide_gradients_too(runs: Runs) -> None:
    plain, divided = (ppo.lines(runs.folder / f"uneven-{name}") for name in ("plain", "zero2"))
    assert len(plain) == len(divided) == 4
    for line, wanted in zip(divided, plain, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_divided_weights_are_resumed_to_the_same_bytes(runs: Runs) -> None:
    assert read_lines(runs.folder / "again" / "output" / "report" / "metrics.jsonl")[-1]["step"] == STEPS
    assert json.loads((runs.folder / "again" / "output" / "report" / "resume.json").read_text()) == {"resumed_from": 2}
    assert files(runs.folder / "again" / "output") == files(runs.folder / "again" / "output-before")


@pytest.mark.slow
def test_two_machines_train_to_the_weights_of_one_with_two_processes(runs: Runs) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    fields = {"gradient_accumulation_steps": 2, "nproc_per_node": 1, "nnodes": 2}
    specs = [runs.spec(f"node-{rank}", "sft", save_steps=2, **fields) for rank in range(2)]

    def machine(rank: int) -> None:
        launch(specs[rank], nodes=Nodes(2, rank, "127.0.0.1", port), deadline=300)

    other = threading.Thread(target=machine, args=(1,))
    other.start()
    machine(0)
    other.join()
    wanted = runs.weights("sft-lora-ddp")
    for rank in range(2):  # each machine has the whole artifact, and whole checkpoints, in its own folder
        saved = runs.weights(f"node-{rank}")
        assert all(torch.equal(saved[name], tensor) for name, tensor in wanted.items())
        checkpoint = runs.folder / f"node-{rank}" / "scratch" / "checkpoints" / f"checkpoint-{STEPS}"
        assert {"whole.json", f"rng_state_{rank}.pth"} <= {path.name for path in checkpoint.iterdir()}


def test_what_a_checkpoint_must_hold_depends_on_who_keeps_the_optimizer() -> None:
    common = {"scheduler.pt", "trainer_state.json"}
    assert required_files(range(1), 1) == common | {"optimizer.pt", "rng_state.pth"}
    assert required_files(range(2, 4), 4) == common | {"optimizer.pt", "rng_state_2.pth", "rng_state_3.pth"}
    assert required_files(range(1), 1, "zero2") == common | {
        "rng_state.pth",
        "latest",
        "global_step*/*zero_pp_rank_0_mp_rank_00_optim_states.pt",
    }


def test_another_number_of_processes_than_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_processes({"nproc_per_node": 1, "nnodes": 2}) == 2
    with pytest.raises(ProgramError, match="nproc_per_node is 1 on 1 machines, the program was started 2 times"):
        count_processes({"nproc_per_node": 1})


def test_fsdp_without_cuda_is_refused_with_the_reason() -> None:
    with pytest.raises(ProgramError, match="fsdp needs CUDA devices: accelerate has it for no processor"):
        process_arguments({"fsdp": True}, cpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP needs a CUDA device, see docs/launching.md")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp_on_one_device_has_the_losses_of_a_run_without(runs: Runs, method: str) -> None:
    fields = {"finetuning_type": method, "gradient_accumulation_steps": 4, "fsdp": True}
    launch(runs.spec(f"fsdp-{method}", "sft", **fields), nodes=Nodes())
    losses = [[line["loss"] for line in runs.lines(name)] for name in (f"fsdp-{method}", f"sft-{method}-one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs.weights(f"fsdp-{method}").keys() == runs.weights(f"sft-{method}-one").keys()
