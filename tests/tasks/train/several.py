"""The training program on several specs, one after the other: importing torch costs more than a tiny run.

Run as `torchrun … -m tests.tasks.train.several SPEC.json`; its settings name the specs. One that is named a second time
goes on from the checkpoint before its last one; what it made first is then in `output-before`.
"""

from __future__ import annotations

import gc
import os
import shutil
from importlib import import_module
from pathlib import Path

from tasks.program import Events, Spec, main
from tasks.train.checkpoints import MARKER
from tasks.training import PROGRAMS


def work_on_all(spec: Spec, events: Events) -> None:
    """Train what each of the specs says, with the environment that the program was started with."""
    import torch.distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    done: set[str] = set()
    for path in spec.settings["specs"]:
        one = Spec.read(path)
        events.emit("note", text=path)
        if path in done:
            if os.environ["RANK"] == "0":
                step_back(one)
            torch.distributed.barrier()
        work = import_module(PROGRAMS.get(one.settings["train"]["stage"], "tasks.train.program")).work
        work(one, Events(one.events))
        gc.freeze()  # the libraries are there now: every Trainer collects garbage, and need not walk through them
        done.add(path)
        unset_hf_deepspeed_config()  # else the next model is loaded in parts, as ZeRO-3 wants it
        os.environ.clear()
        os.environ.update(before)


def step_back(spec: Spec) -> None:
    """Leave the state of a run that was killed before its last checkpoint was whole."""
    output = Path(spec.output)
    output.rename(output.with_name("output-before"))
    output.mkdir()
    markers = Path(spec.scratch, "checkpoints").glob(f"checkpoint-*/{MARKER}")
    newest = max(markers, key=lambda path: int(path.parent.name.rpartition("-")[2]))
    shutil.move(newest, newest.with_name("moved.json"))


if __name__ == "__main__":
    main(work_on_all, lambda spec: {"deepspeed"})
