"""A model server in this process, on loopback, and clients of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import uvicorn

from tasks.chat_model import ChatModel
from tasks.chat_program import address, listen
from tasks.chat_server import ChatServer
from tasks.train.loading import load_base

READING = {"template": None, "default_system": None, "enable_thinking": None, "control_tokens": "plain"}
KEY = "a key"


def chat_model(folder: Path, name: str = "tiny", **reading: Any) -> ChatModel:
    """A model of a folder, on the CPU in float32."""
    return ChatModel(name, folder, READING | reading, lambda: load_base(str(folder), torch.float32).eval())


@contextmanager
def serving(models: Sequence[ChatModel], defaults: Mapping[str, Any], api_key: str | None = KEY) -> Iterator[str]:
    """Where models answer."""
    sock = listen("127.0.0.1", 0)
    app = ChatServer(models, defaults, api_key, loopback=True).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield address(sock)
    finally:
        server.should_exit = True
        thread.join()


def ask(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of one request."""
    place = urlsplit(url)
    connection = HTTPConnection(str(place.hostname), place.port, timeout=60)
    said = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    said |= {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request("POST" if content is not None else "GET", path, content, said)
    answer = connection.getresponse()
    try:
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: it never was.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never was so"
        time.sleep(0.02)
