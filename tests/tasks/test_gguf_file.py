"""A GGUF file is made by llama.cpp's converter and compared with the model; the converter here is a stand-in, and the
real one where LLAMATUNER_LLAMA_CPP points to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from registry.errors import InputError
from tasks.gguf_file import PLACE, find_converter, make_gguf, needed_bytes, parse_type, read_back
from tasks.launch import ProgramFailed
from tests.oracle import need_oracle, tokenizer_folder
from tests.tasks.converter import WRONG
from tests.tiny import tiny_model

PROJECT = Path(__file__).parents[2]
CONVERTER = (sys.executable, str(PROJECT / "tests" / "tasks" / "converter.py"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def test_a_file_is_written_beside_the_weights_and_nothing_else(model: Path) -> None:
    before = {path.name for path in model.iterdir()}
    config = (model / "tokenizer_config.json").read_bytes()
    found = make_gguf(model, "tiny-sft", "f16", CONVERTER)
    assert found.path == model / "tiny-sft-F16.gguf"
    assert (found.tensors, found.adds_bos) == (20, False)
    assert {path.name for path in model.iterdir()} - before == {found.path.name}
    assert (model / "tokenizer_config.json").read_bytes() == config
    size = sum(value.numel() for value in load_file(model / "model.safetensors").values())
    assert needed_bytes(model, "f16") == 2 * size


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("fail", "NotImplementedError: this model is not known"),
        ("nothing", "converter.py wrote no tiny-F16.gguf; its last lines:\nINFO: converting"),
        ("token", "1 of 256 tokens are others, the first is 'ÿ'"),
        ("template", "its chat template is not the model's"),
        ("bos", "tiny-F16.gguf has a BOS put in front, the model's tokenizer does otherwise"),
        ("no bos", "it does not say whether a text begins with a BOS"),
        ("shape", "blk.0.ffn_down.weight has the shape [31, 64], model.layers.0.mlp.down_proj.weight [32, 64]"),
        ("tensor", "model.norm.weight is missing"),
        ("more", "it has 1 tensors more, such as blk.0.attn_x.weight"),
    ],
)
def test_what_is_not_the_model_is_said(model: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, said: str) -> None:
    monkeypatch.setenv(WRONG, wrong)
    with pytest.raises(ProgramFailed) as caught:
        make_gguf(model, "tiny", "f16", CONVERTER)
    assert said in str(caught.value)
    assert not [path for path in model.iterdir() if path.name.startswith(".")]


def test_a_number_that_float16_cannot_hold_is_named(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    state["model.embed_tokens.weight"][0, 0] = 1e6
    save_file(state, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ProgramFailed, match=r"token_embd.weight holds numbers that float16 cannot hold \(use --gguf-type"
    ):
        make_gguf(model, "tiny", "f16", CONVERTER)


def test_half_a_file_is_refused(model: Path) -> None:
    path = make_gguf(model, "tiny", "f32", CONVERTER).path
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ProgramFailed, match=r"tiny-F32.gguf cannot be read: "):
        read_back(path, model, "f32")


KILLED = """
import sys
from pathlib import Path
from tasks.gguf_file import make_gguf

make_gguf(Path(sys.argv[1]), "tiny", "f16", tuple(sys.argv[2:]))
"""


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_the_converter_ends_with_who_started_it(model: Path, sig: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), WRONG: "wait"}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(model), *CONVERTER],
        cwd=PROJECT,
        env=environment,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (model / "tiny-F16.gguf").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    below = psutil.Process(child.pid).children(recursive=True)
    assert [str(model / ".gguf-source") in process.cmdline() for process in below] == [True]
    child.send_signal(sig)
    child.wait(60)
    gone, alive = psutil.wait_procs(below, timeout=30)
    assert (len(gone), alive) == (1, [])


def test_the_converter_is_found_by_its_variable_or_on_the_path(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_converter({"PATH": str(tmp_path)})
    assert str(caught.value) == (
        "--gguf: llama.cpp's converter convert_hf_to_gguf.py is not on this machine. Get llama.cpp (git clone "
        "https://github.com/ggml-org/llama.cpp) and set LLAMATUNER_LLAMA_CPP to its folder."
    )
    with pytest.raises(InputError, match=rf"{PLACE}={tmp_path}: there is no convert_hf_to_gguf.py"):
        find_converter({PLACE: str(tmp_path)})
    command = tmp_path / "convert-hf-to-gguf"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    assert find_converter({"PATH": str(tmp_path)}) == (str(command),)
    assert find_converter({PLACE: str(command)}) == (str(command),)


def test_types_are_those_the_converter_writes() -> None:
    assert [parse_type(text) for text in ("f16", "BF16", "Q8_0")] == ["f16", "bf16", "q8_0"]
    for text, cure in (("f61", "Did you mean f16"), ("Q4_K_M", "llama-quantize makes Q4_K_M of a file of type f16")):
        with pytest.raises(InputError, match=cure):
            parse_type(text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "q8_0"])
def test_llamacpps_own_converter_writes_the_model(tmp_path: Path, kind: str) -> None:
    if not os.environ.get(PLACE):
        pytest.skip(f"{PLACE} names no checkout of llama.cpp")
    need_oracle()
    folder = tiny_model(tmp_path / "tiny", vocab_size=49152, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    for path in tokenizer_folder("smollm2").iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder / path.name)
    template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    if template:  # the tokenizer's own, and not the tiny one's
        (folder / "chat_template.jinja").write_text(template)
    found = make_gguf(folder, "tiny", kind, find_converter())
    assert (found.tensors, found.adds_bos) == (20, False)
    size = needed_bytes(folder, kind)
    assert size * 0.9 < found.path.stat().st_size < size * 1.5 + 3_000_000
