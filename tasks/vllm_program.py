"""The program that lets vLLM answer for a model: it starts vLLM's own server, and says where when that answers.

One decision: vLLM is a command of its own installation, since its torch is seldom ours; nothing of it is imported. It
reads the same spec as `tasks.chat_program`, of one model.

Run as `python -m tasks.vllm_program SPEC.json`. The API key comes in the environment, and goes on in it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from registry.chat_settings import generation
from registry.errors import InputError, Problem
from tasks.chat_program import API_KEY
from tasks.program import Events, ProgramError, Spec, ended_by, main

COMMAND = "vllm"
VLLM_KEY = "VLLM_API_KEY"
# as vLLM calls them, too; `max_new_tokens` would also be the most that a request can ask for, so only if it is given
DEFAULTS = ("top_p", "top_k", "repetition_penalty", "max_new_tokens")
POLL_SECONDS = 0.3
ANSWER_SECONDS = 5.0  # for one question about its health


def find_vllm() -> str:
    """The path of the command.

    Raises:
        InputError: there is none.
    """
    found = shutil.which(COMMAND)
    if found is None:
        cure = "Install it (pip install vllm) in an environment of its own and put its bin folder on PATH."
        raise InputError(Problem("--engine vllm", "there is no command vllm on PATH", cure))
    return found


def command_line(
    program: str,
    folder: str,
    model: Mapping[str, Any],
    given: Mapping[str, Any],
    place: tuple[str, int],
    template: Path,
) -> list[str]:
    """How vLLM's server is started.

    Args:
        program: path of the command.
        folder: the model.
        model: `name`, `bf16`, `template`, `enable_thinking`, as `tasks.chat_program` has them.
        given: those settings of generation that are given, which are the defaults of requests.
        place: host and port.
        template: file for the text of a template that is not the folder's own; written if there is one.
    """
    asked = generation(given)
    written = {"temperature": asked.temperature if asked.do_sample else 0.0}
    written |= {name: getattr(asked, name) for name in DEFAULTS if name in given}
    command = [program, "serve", folder, "--served-model-name", model["name"]]
    command += ["--host", place[0], "--port", str(place[1]), "--allowed-origins", "[]"]
    # "auto" would hold float32 weights in float16
    command += ["--dtype", "bfloat16" if model["bf16"] else "float32"]
    command += ["--generation-config", "vllm", "--override-generation-config", json.dumps(written)]
    if "seed" in given:
        command += ["--seed", str(asked.seed)]
    if model["template"] is not None:
        template.write_text(model["template"], encoding="utf-8")
        command += ["--chat-template", str(template)]
    if model["enable_thinking"] is not None:
        command += ["--default-chat-template-kwargs", json.dumps({"enable_thinking": model["enable_thinking"]})]
    return command


def work(spec: Spec, events: Events) -> None:
    """Start vLLM, and wait until it ends.

    Raises:
        InputError: there is no vLLM.
        ProgramError: it ended by itself.
    """
    (model,) = spec.settings["models"]
    place = (spec.runtime["host"], spec.runtime["port"])
    given = spec.settings["generation"]
    template = Path(spec.scratch).with_suffix(".jinja")
    command = command_line(find_vllm(), spec.inputs["model.0"], model, given, place, template)
    environment = dict(os.environ)
    key = environment.pop(API_KEY, "")
    environment |= {VLLM_KEY: key} if key else {}
    child = subprocess.Popen([sys.executable, "-m", "tasks.guarded", *command], env=environment)
    signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    events.note("vLLM is starting; this can take minutes")
    url = f"http://[{place[0]}]:{place[1]}" if ":" in place[0] else f"http://{place[0]}:{place[1]}"
    while child.poll() is None and not _healthy(url):
        time.sleep(POLL_SECONDS)
    if child.poll() is None:
        events.emit("ready", url=url)
    code = child.wait()
    if code != 0:
        died = ended_by(-code) if code < 0 else f"ended with exit code {code}"
        tail = "\n".join((Path(spec.events).parent / "program.log").read_text(errors="replace").splitlines()[-15:])
        raise ProgramError("killed" if code < 0 else "unexpected", f"vLLM {died}; its last lines:\n{tail}")


def _healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=ANSWER_SECONDS) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


if __name__ == "__main__":
    main(work)
