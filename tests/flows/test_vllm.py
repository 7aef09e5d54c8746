"""`serve --engine vllm`: how vLLM's server is started, what is refused, and what is left when it ends.

One decision: vLLM is a stand-in here: a command of its name that writes down what it was told, and is healthy.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from tasks.chat_program import listen
from tests.flows.processes import require_gone, tree
from tests.flows.toy import LONGEST, start
from tests.tiny import tiny_model

STAND_IN = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *words):
        pass

told = sys.argv[1:]
with open({record!r}, "w") as file:
    keys = [os.environ.get(name) for name in ("VLLM_API_KEY", "LLAMATUNER_API_KEY")]
    json.dump({{"argv": told, "keys": keys}}, file)
if "broken" in told:
    sys.exit("RuntimeError: no GPU is here")
HTTPServer((told[told.index("--host") + 1], int(told[told.index("--port") + 1])), Healthy).serve_forever()
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in, which is on the path, writes what it was told."""
    path = tmp_path / "told.json"
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable, record=str(path)))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return path


def free_port() -> int:
    with listen("127.0.0.1", 0) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.slow
def test_vllm_is_told_what_transformers_would_be_and_ends_with_its_command(model: Path, record: Path) -> None:
    port = free_port()
    settings = ["--set", "temperature=0.5", "--set", "top_p=0.9", "--set", "seed=3", "--set", "bf16=true"]
    settings += ["--set", "enable_thinking=false", "--set", "template=chatml"]
    words = ["serve", str(model), "--engine", "vllm", "--port", str(port), "--json", *settings]
    process = start(*words, LLAMATUNER_API_KEY="secret")
    try:
        assert process.stdout is not None
        up = json.loads(process.stdout.readline())
        assert up == {"status": "up", "url": f"http://127.0.0.1:{port}/v1", "models": ["one"]}
        told = json.loads(record.read_text())
        assert told["keys"] == ["secret", None]
        argv = told["argv"]
        assert argv[:10] == [
            *("serve", str(model), "--served-model-name", "one", "--host", "127.0.0.1", "--port", str(port)),
            *("--allowed-origins", "[]"),
        ]
        options = dict(zip(argv[8::2], argv[9::2], strict=True))
        assert "<|im_start|>" in Path(options.pop("--chat-template")).read_text()
        assert json.loads(options.pop("--override-generation-config")) == {"temperature": 0.5, "top_p": 0.9}
        assert options == {
            "--allowed-origins": "[]",
            "--dtype": "bfloat16",
            "--generation-config": "vllm",
            "--seed": "3",
            "--default-chat-template-kwargs": '{"enable_thinking": false}',
        }
        processes = tree(process)
        assert not any("secret" in word for each in processes for word in each.cmdline())
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=LONGEST)
        assert process.returncode == 0
        require_gone(processes)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_vllm_that_fails_is_quoted(model: Path, record: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    process = start("serve", str(broken), "--engine", "vllm", "--port", str(free_port()))
    _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    assert "vLLM ended with exit code 1; its last lines:" in said
    assert "RuntimeError: no GPU is here" in said


def refusal(capsys: Capture, *arguments: Any) -> str:
    capsys.readouterr()
    assert run_app(["serve", *map(str, arguments)]) == 2
    return capsys.readouterr().err.replace("\n", " ")


def test_what_vllm_would_do_otherwise_is_refused(
    model: Path, record: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ("--engine", "vllm", "--port", free_port())
    other = tiny_model(tmp_path / "other", eos_token_id=258)
    said = refusal(
        capsys, model, other, *here, "--set", "default_system=Hi", "--set", "quant_bit=4", "--set", "num_beams=2"
    )
    assert "--engine vllm: holds one model. Name one." in said
    assert said.count("default_system: vLLM puts no system message of its own in front.") == 2
    assert "quant_bit: vLLM holds the model in whole numbers of bits of its own." in said
    assert "num_beams: is about beams, which vLLM does not follow. Leave --engine out: transformers does it." in said
    monkeypatch.setenv("LLAMATUNER_API_KEY", "secret")
    assert "vLLM asks for the key at /v1 only" in refusal(capsys, model, *here, "--host", "0.0.0.0")
    assert "--engine: 'vlm' is no engine. Did you mean vllm?" in refusal(capsys, model, "--engine", "vlm")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--engine vllm: there is no command vllm on PATH. Install it" in refusal(capsys, model, *here)
    assert not record.exists()
