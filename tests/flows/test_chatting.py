"""`chat` and `serve`: which models they take, what they refuse, and what is left when they end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.chatting import find_partners
from flows.cli.app import run_app
from flows.cli.chat_configs import read_words
from flows.cli.making import make_steps
from flows.cli.output import people
from registry.chat_settings import read_chat
from registry.errors import InputError
from registry.evaluation_records import GenerationSettings
from registry.home import Home
from tasks.chat_client import Client
from tasks.chat_program import listen
from tests.flows.processes import kill, require_gone, tree
from tests.flows.toy import LONGEST, PROJECT, start
from tests.flows.twins import work_here
from tests.tasks.chat_servers import chat_model
from tests.tiny import read_lines, tiny_model, tiny_scoring_model

Capture = pytest.CaptureFixture[str]
CLI = (sys.executable, "-m", "flows")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, an adapter of the first, a reward model, and a model without a chat template."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tasks.train.loading import load_base

    folder = tmp_path_factory.mktemp("models")
    one = tiny_model(folder / "one")
    tiny_model(folder / "two", seed=1)
    tiny_scoring_model(folder / "judge")
    bare = tiny_model(folder / "bare")
    (bare / "chat_template.jinja").unlink()
    torch.manual_seed(0)
    wrapped = get_peft_model(load_base(str(one), torch.float32), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    wrapped.save_pretrained(folder / "adapter")
    return folder


def refusal(capsys: Capture, *arguments: Any) -> str:
    capsys.readouterr()
    assert run_app([*map(str, arguments)]) == 2
    return capsys.readouterr().err.replace("\n", " ")


def test_models_have_names_of_their_own_and_are_read_as_is_said(folder: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "one", seed=3)
    said = read_chat(["template=chatml", "bf16=true", "default_system=Be brief.", "temperature=0.5"])
    found = find_partners([str(folder / "one"), str(other), str(folder / "two")], said, Home.open())
    assert [partner.name for partner in found] == [str(folder / "one"), str(other), "two"]
    told = found[2].told()
    assert (told["bf16"], told["default_system"], told["control_tokens"]) == (True, "Be brief.", "plain")
    assert "<|im_start|>" in told["template"]
    assert said.generation == {"temperature": 0.5, "do_sample": True}
    (quantised,) = find_partners([str(folder / "two")], read_chat(["quant_bit=4"]), Home.open())
    assert quantised.told()["quantised"] == {"quant_bit": 4, "quant_type": "nf4", "double_quantization": True}


def test_an_adapter_answers_on_the_base_that_it_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_here(monkeypatch)
    home = Home.open()
    (partner,) = find_partners([str(folder / "adapter")], read_chat([]), home)
    (step,) = partner.steps
    (made,) = make_steps([step], home, people(False))
    answers = []
    for place in (made.path, folder / "one"):
        model = chat_model(place)
        prompt = model.prompt([{"role": "user", "content": "Who are you?"}])
        answers.append(model.answer(prompt, GenerationSettings(max_new_tokens=8)).text)
    assert answers[0] != answers[1]


def test_what_cannot_answer_is_refused_before_anything_is_loaded(folder: Path, capsys: Capture) -> None:
    text = refusal(capsys, "chat", folder / "bare")
    assert "bare: the model has no chat template. Choose one, such as --set template=chatml" in text
    assert find_partners([str(folder / "bare")], read_chat(["template=chatml"]), Home.open())[0].name == "bare"
    assert "is a reward model" in refusal(capsys, "serve", folder / "judge", "--port", "1024")
    both = refusal(capsys, "chat", folder / "bare", folder / "two", folder / "two", "nothing-here")
    assert "stands there twice" in both
    assert "'nothing-here' is not a known model" in both
    wrong = refusal(capsys, "chat", folder / "one", "--set", "temprature=1", "--set", "top_p=2", "--set", "lora_rank=3")
    assert "temprature: is no setting of a chat. Did you mean temperature" in wrong
    assert "2 should be less than or equal to 1" in wrong
    assert "lora_rank: is no setting of a chat" in wrong
    assert "--votes: is about the page. Add --web." in refusal(capsys, "chat", folder / "one", "--votes", "x.jsonl")
    assert "--sytem: no such option" in refusal(capsys, "chat", folder / "one", "--sytem", "x")


def test_strangers_are_let_in_with_a_key_only_and_a_taken_port_is_said_first(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMATUNER_API_KEY", raising=False)
    text = refusal(capsys, "serve", folder / "one", "--host", "0.0.0.0")
    assert "--host 0.0.0.0: others than this machine reach it" in text
    assert "Set LLAMATUNER_API_KEY in the environment" in text
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: another program listens there" in refusal(capsys, "serve", "no-model", "--port", port)
        assert f"port {port}: another" in refusal(capsys, "chat", "--web", "no-model", "--port", port)


def test_configs_of_llama_factory_are_read_in_their_words(tmp_path: Path) -> None:
    config = tmp_path / "chat.yaml"
    config.write_text(
        "model_name_or_path: base\nadapter_name_or_path: saves/lora\ntemplate: llama3\ninfer_backend: huggingface\n"
        "trust_remote_code: true\nfinetuning_type: lora\nquantization_bit: 4\n"
    )
    names, said = read_words([str(config), "top_p=0.5"], ["max_new_tokens=7"])
    assert names == ["saves/lora"]
    wanted = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.95, "top_p": 0.5, "top_k": 50}
    assert said.generation == wanted
    assert said.model.settings.train.quant_bit == 4
    assert "<|start_header_id|>" in str(said.model.settings.template)
    told = "\n".join(said.notes)
    for words in (
        "quantization_bit is read as quant_bit",
        "trust_remote_code: no effect",
        "an adapter answers on the base",
    ):
        assert words in told
    names, said = read_words(["--model_name_or_path", "m", "--template", "qwen", "--do_sample", "false"], [])
    assert (names, said.generation) == (["m"], {"do_sample": False})
    config.write_text("model_name_or_path: base\ninfer_backend: vllm\n")
    with pytest.raises(InputError, match=r"infer_backend: 'vllm': models answer here through transformers"):
        read_words([str(config)], [])


@pytest.mark.slow
def test_lines_are_answered_and_kept_as_rows_for_training(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "talk.jsonl"
    lines = f"Hi\nAgain\n/undo\n/retry\n/model two\nMore\n/save {rows}\n/nothing\n/set max_new_tokens 0\n/exit\nno\n"
    arguments = ("chat", str(folder / "one"), str(folder / "two"), "--system", "Be brief.", "--set", "max_new_tokens=5")
    given = tmp_path / "lines"
    given.write_text(lines)
    with open(given) as source:
        process = subprocess.Popen(
            [*CLI, *arguments], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PROJECT
        )
        out, err = process.communicate(timeout=LONGEST)
    told = err.decode()
    assert process.returncode == 1, told  # two of the lines were none that can be
    assert "'/nothing' is no command. Known: /clear" in told
    assert "0 should be greater than or equal to 1" in told
    assert not any(byte < 32 and byte != 10 and byte != 9 for byte in out)
    (row,) = read_lines(rows)
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in row["messages"] if message["role"] == "user"] == ["Hi", "More"]
    assert row["messages"][0]["content"] == "Be brief."


@pytest.mark.slow
def test_a_served_model_answers_and_nothing_is_left_when_its_command_is_killed(folder: Path, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    process = start("serve", str(folder / "one"), "--port", str(port), "--json", LLAMATUNER_API_KEY="secret")
    try:
        assert process.stdout is not None
        up = json.loads(process.stdout.readline())
        assert up == {"status": "up", "url": f"http://127.0.0.1:{port}/v1", "models": ["one"]}
        client = Client(f"http://127.0.0.1:{port}", "secret")
        assert client.models() == ["one"]
        processes = tree(process)
        assert len(processes) > 1
        assert not any("secret" in word for each in processes for word in each.cmdline())
        kill([psutil.Process(process.pid)])
        require_gone(processes)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_ctrl_c_ends_a_server_as_it_should(folder: Path) -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    process = start("serve", str(folder / "one"), "--port", str(port), "--json")
    assert process.stdout is not None
    process.stdout.readline()
    processes = tree(process)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=LONGEST)
    assert process.returncode == 0
    require_gone(processes)


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_the_answer_and_keeps_the_conversation(folder: Path, tmp_path: Path) -> None:
    mine, theirs = os.openpty()
    rows = tmp_path / "talk.jsonl"
    process = subprocess.Popen(
        [*CLI, "chat", str(folder / "one"), "--set", "max_new_tokens=400"],
        cwd=PROJECT,
        preexec_fn=lambda: (signal.signal(signal.SIGINT, signal.SIG_DFL), os.login_tty(theirs)),
    )
    os.close(theirs)
    shown = b""

    def until(words: bytes) -> None:
        nonlocal shown
        while words not in shown:
            assert select.select([mine], [], [], LONGEST)[0], shown
            shown += os.read(mine, 4096)
        shown = shown.partition(words)[2]

    until(b"> ")
    os.write(mine, "你好\n".encode())
    until(b"\n")
    while len(shown.strip()) < 3:  # the answer has begun
        shown += os.read(mine, 4096)
    os.write(mine, b"\x03")
    until(b"the answer so far is part of the conversation")
    os.write(mine, f"/save {rows}\n/undo\n".encode())
    until("taken back: 你好".encode())
    os.write(mine, b"\x03")
    until(b"Ctrl-D or /exit ends the chat")
    until(b"> ")  # before the prompt the terminal itself would take the key
    os.write(mine, b"\x04")
    assert process.wait(LONGEST) == 0
    os.close(mine)
    (row,) = read_lines(rows)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == "你好"
    assert 0 < len(row["messages"][1]["content"].encode()) < 400
