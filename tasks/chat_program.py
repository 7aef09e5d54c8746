"""The program that holds models and answers for them over HTTP.

One decision: it listens before it loads anything, so that a port that is taken costs a second; and it says where only
when every model is there.

Run as `python -m tasks.chat_program SPEC.json`. The API key comes in the environment: the spec is a file.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from tasks.evaluate_program import QUANTISED, load, optional_packages
from tasks.program import Events, Spec, main

API_KEY = "LLAMATUNER_API_KEY"
READING = ("template", "default_system", "enable_thinking", "control_tokens")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STOP_SECONDS = 2  # for answers that are being written


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: name or address.
        port: 0: any that is free.

    Raises:
        InputError: the port is taken or not ours to use, or the host is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            cure = f"Choose another one (--port {_free_port()}), or end what listens there."
            raise InputError(Problem(f"port {port}", "another program listens there", cure)) from error
        if error.errno == errno.EACCES:
            raise InputError(Problem(f"port {port}", "only root may listen there", "Choose one above 1023.")) from error
        cure = "Use 127.0.0.1, or 0.0.0.0 for all addresses of this machine."
        raise InputError(Problem(f"--host {host}", f"is no address of this machine ({error})", cure)) from error
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def work(spec: Spec, events: Events) -> None:
    """Listen, load, answer until SIGTERM.

    `settings` has `models`, in the order of the inputs `model.0`, `model.1`, …: `name`, `bf16`, perhaps `quantised`,
    and what `tasks.chat_model.ChatModel` reads with; and `generation`. `runtime` has `host` and `port`. Emits `ready`
    with `url` when requests are answered.

    Raises:
        InputError: the port is taken, or a model has no usable chat template.
    """
    host = spec.runtime["host"]
    sock = listen(host, spec.runtime["port"])
    events.note("loading libraries")
    import uvicorn

    from tasks.chat_model import ChatModel
    from tasks.chat_server import ChatServer

    models: list[ChatModel] = []
    loaded: dict[str, Any] = {}  # a model that stands there twice, read in two ways, is held once
    for number, settings in enumerate(spec.settings["models"]):
        name, folder = settings["name"], spec.inputs[f"model.{number}"]
        part = replace(spec, settings=settings, inputs={"model": folder})
        held = repr((folder, settings["bf16"], settings.get(QUANTISED)))
        events.note(f"loading {name}")
        loading = partial(lambda held, part: loaded.get(held) or load(part), held, part)
        models.append(ChatModel(name, Path(folder), {key: settings[key] for key in READING}, loading))
        loaded[held] = models[-1].model
    server = ChatServer(models, spec.settings["generation"], os.environ.get(API_KEY) or None, host in LOOPBACK)
    config = uvicorn.Config(
        server.app(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=STOP_SECONDS,
        ws="none",
    )
    events.emit("ready", url=address(sock))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uvicorn.Server(config).run(sockets=[sock])


def address(sock: socket.socket) -> str:
    """Where a socket is reached from this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uses(spec: Spec) -> set[str]:
    """Which of `tasks.program.OPTIONAL` the models need."""
    parts = enumerate(spec.settings["models"])
    specs = (replace(spec, settings=s, inputs={"model": spec.inputs[f"model.{n}"]}) for n, s in parts)
    return set().union(*map(optional_packages, specs))


if __name__ == "__main__":
    main(work, uses)
