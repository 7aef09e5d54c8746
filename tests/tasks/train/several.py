"""The training program on several specs, one after the other: importing torch costs more than a tiny run.

Run as `torchrun … -m tests.tasks.train.several SPEC.json`; its settings name the specs.
"""

from __future__ import annotations

import os

from tasks.program import Events, Spec, main
from tasks.train.program import work


def work_on_all(spec: Spec, events: Events) -> None:
    """Train what each of the specs says, with the environment that the program was started with."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    for path in spec.settings["specs"]:
        one = Spec.read(path)
        events.emit("note", text=path)
        work(one, Events(one.events))
        unset_hf_deepspeed_config()  # else the next model is loaded in parts, as ZeRO-3 wants it
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    main(work_on_all)
