"""A chain of stages is one run, and `llamatuner export` gives its models away: lineage, bytes, and what is refused.

One decision: one run of three small stages is made for the whole file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from flows.cli.app import run_app
from flows.comparison import find_side
from registry.home import Home
from tasks.artifacts import Artifact, Store, weights_digest
from tasks.digests import DigestMemory
from tasks.gguf_file import PLACE
from tasks.ollama import written
from tests.flows.conftest import Server
from tests.flows.test_chains import write_pairs
from tests.flows.toy import PROJECT, run, states, toy_recipe
from tests.small_hub import TakingHub, serving, taking_hub
from tests.tasks.converter import WRONG

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: Server) -> tuple[Path, Path]:
    """A recipe (sft with all weights → dpo with LoRA, and a reward model) and the home in which it is done."""
    folder = tmp_path_factory.mktemp("three")
    toy_recipe(folder / "recipe")
    write_pairs(folder / "recipe" / "pairs.jsonl", 12, "pair")
    raw = {
        "name": "three",
        "model_name_or_path": "model",
        "cutoff_len": 160,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "lora_rank": 4,
        "per_device_train_batch_size": 2,
        "stages": {
            "sft": {"stage": "sft", "dataset": "train.jsonl", "finetuning_type": "full"},
            "dpo": {"stage": "dpo", "model": "sft", "dataset": "pairs.jsonl", "val_size": 3},
            "rm": {"stage": "rm", "dataset": "pairs.jsonl", "finetuning_type": "full"},
        },
    }
    recipe = folder / "recipe" / "three.json"
    recipe.write_text(json.dumps(raw))
    answer = run("run", str(recipe), LLAMATUNER_HOME=str(folder / "home"), PREFECT_API_URL=server.url)
    (folder / "recipe" / "answer.json").write_text(json.dumps(answer))
    return recipe, folder / "home"


@pytest.fixture
def recipe(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The recipe, with the home in which it is done."""
    monkeypatch.setenv("LLAMATUNER_HOME", str(made[1]))
    return str(made[0])


def ask(capsys: Capture, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The one JSON line of `export`."""
    capsys.readouterr()
    assert run_app(["export", *arguments, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    answer: dict[str, Any] = json.loads(out)
    return answer


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def artifact(home: str, step: str, name: str) -> Artifact:
    (found,) = (a for a in Store(Home(Path(home))).all() if a.step == step and a.manifest["label"] == name)
    return found


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the card's own code in an exported folder; what it prints."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    script = folder.parent / "use.py"
    script.write_text(code)
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(script))
    return printed.getvalue()


def test_a_chain_is_one_run_and_a_change_of_dpo_redoes_dpo_only(recipe: str) -> None:
    first = json.loads(Path(recipe).with_name("answer.json").read_text())
    assert first["status"] == "completed"
    assert {"sft/evaluate:dpo", "dpo/evaluate", "rm/train"} <= set(states(first))
    results = first["results"]
    assert set(results) == {"sft:dpo", "sft", "dpo", "rm"}  # what dpo starts from is measured as dpo is
    assert results["sft:dpo"]["perplexity.validation"] != results["dpo"]["perplexity.validation"]
    assert results["dpo"]["train.rewards/margins"]["value"] != 0.0
    plan = run("plan", recipe, "--set", "stages.dpo.pref_beta=0.3")
    waiting = {f"{step['stage']}/{step['step']}" for step in plan["steps"] if step["state"] != "cached"}
    assert waiting == {"dpo/train", "dpo/merge", "dpo/evaluate", "dpo/implicit_reward"}
    assert run("run", recipe)["status"] == "up-to-date"


def test_a_stage_is_compared_with_the_model_it_started_from(recipe: str, made: tuple[Path, Path]) -> None:
    side = find_side("three:dpo", Home(made[1]))
    ((before, names),) = side.befores
    assert names == ["validation"]
    assert before.manifest["inputs"]["model"]["digest"] == artifact(str(made[1]), "train", "three-sft").digest


def test_the_card_of_a_chain_names_every_artifact_data_set_and_number(
    recipe: str, made: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    answer = ask(capsys, recipe, "--stage", "dpo", "--to", str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    home = str(made[1])
    for stage, step in (("sft", "train"), ("dpo", "train"), ("dpo", "merge")):
        found = artifact(home, step, f"three-{stage}")
        assert re.search(rf"\| {stage}/{step} \| .* \| {found.key} \| {found.digest} \|", text)
    merged = artifact(home, "merge", "three-dpo")
    assert (answer["key"], answer["digest"], answer["dtype"]) == (merged.key, merged.digest, "float32")
    base = artifact(home, "train", "three-sft").manifest["inputs"]["base"]["digest"]
    assert f"| base | model |  | {base} |" in text
    assert "sft (sft, full) → dpo (dpo, lora)" in text
    for line in (
        r"\| sft \| train \| files \| trained on \| 24 \| [0-9a-f]{64} \|",
        r"\| dpo \| pairs \| files \| trained on \| 9 \| [0-9a-f]{64} \|",
        r"\| dpo \| pairs \| files \| measured on as validation \| 3 \| [0-9a-f]{64} \|",
    ):
        assert len(re.findall(line, text)) == 1
    results = json.loads((artifact(home, "evaluate", "three-dpo").path / "results.json").read_text())
    before = json.loads((artifact(home, "evaluate", "three-sft").path / "results.json").read_text())
    value, start = (found["perplexity.0"]["value"] for found in (results, before))
    assert f"| perplexity.validation | 3 | {start:.6g} | {value:.6g} |" in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["llamatuner", "dpo", "lora"]
    settings = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert [(s["stage"], s.get("lora_rank"), s["max_steps"], s["seed"], s["cutoff_len"]) for s in settings] == [
        ("sft", None, 2, 42, 160),
        ("dpo", 4, 2, 42, 160),
    ]
    assert f"torch {torch.__version__}" in text
    template = hashlib.sha256((tmp_path / "out" / "chat_template.jinja").read_bytes()).hexdigest()
    assert text.count(f"Chat template: the base model's own, sha256 `{template}`.") == 2


def test_when_where_and_by_which_run_artifacts_were_made_changes_no_byte(
    recipe: str, made: tuple[Path, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(capsys, recipe, "--stage", "dpo", "--to", str(tmp_path / "one"))
    other = tmp_path / "moved"
    shutil.copytree(made[1], other)
    store = Store(Home(other))
    told = {"created": "2001-02-03T04:05:06", "seconds": 7.5, "argv": ["/elsewhere/x"], "git_commit": "0" * 40}
    for one in list(store.all()):
        store.annotate(one, **told, mlflow_run_id="1" * 32)
    monkeypatch.setenv("LLAMATUNER_HOME", str(other))
    ask(capsys, recipe, "--stage", "dpo", "--to", str(tmp_path / "two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    everything = b"".join(contents(tmp_path / "one").values())
    manifest = artifact(str(made[1]), "merge", "three-dpo").manifest
    for own in (str(tmp_path), str(made[1].parent), manifest["created"][:10], manifest["git_commit"][:12]):
        assert own.encode() not in everything


def test_the_cards_own_code_loads_the_model_and_answers(
    recipe: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(capsys, recipe, "--stage", "sft", "--to", str(tmp_path / "out"), "--dtype", "bf16", "--max-shard-size", "40KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    printed = use(tmp_path / "out", monkeypatch)
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16
    asked = torch.tensor([tokenizer.encode("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")])
    answer = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=128, do_sample=False)
    assert printed == tokenizer.decode(answer[0, asked.shape[1] :], skip_special_tokens=True) + "\n"


def test_a_reward_model_loads_with_its_head_and_scores_as_ours_does(
    recipe: str, made: tuple[Path, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.train.reward import answer_scores, load_scoring

    ask(capsys, recipe, "--stage", "rm", "--to", str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "text-classification"
    assert "A reward model as whole weights. Made with" in text
    assert "Nothing was measured on held-out rows." in text
    printed = use(tmp_path / "out", monkeypatch)
    source = artifact(str(made[1]), "train", "three-rm").path
    ids = [
        *AutoTokenizer.from_pretrained(source).encode(
            "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHello."
        )
    ]
    ids = torch.tensor([[*ids, 260]])  # the answer's end
    model = load_scoring(str(source), torch.float32).eval()
    with torch.no_grad():
        score = answer_scores(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    assert float(printed) == pytest.approx(float(score[0]), rel=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 1


def test_an_adapter_goes_onto_the_export_of_the_stage_before(recipe: str, tmp_path: Path, capsys: Capture) -> None:
    ask(capsys, recipe, "--stage", "dpo", "--adapter", "--to", str(tmp_path / "adapter"))
    for stage in ("sft", "dpo"):
        ask(capsys, recipe, "--stage", stage, "--to", str(tmp_path / stage))
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "chat_template.jinja"}
    assert set(contents(tmp_path / "adapter")) == names | {"tokenizer.json", "tokenizer_config.json"}
    start, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("sft", "dpo"))
    model = PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max() < 1e-4
    digest = weights_digest(tmp_path / "sft", DigestMemory(tmp_path / "digests"))
    assert json.loads((tmp_path / "adapter" / "base.json").read_text()) == {"base_digest": digest}


def test_a_run_that_is_not_finished_is_refused_with_what_is_missing(
    recipe: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ("--to", str(tmp_path / "out"))
    answer = ask(capsys, recipe, "--stage", "dpo", "--set", "stages.dpo.pref_beta=0.3", *target, code=2)
    assert answer["error"] == (
        "export: stage dpo is not done: dpo/train (train.pref_beta 0.1 → 0.3), and 3 steps behind. "
        f"First run `llamatuner run {recipe}`, with the same --set."
    )
    # what another stage lacks is of no account
    ask(capsys, recipe, "--stage", "sft", "--set", "stages.dpo.pref_beta=0.3", *target)
    monkeypatch.setenv("LLAMATUNER_HOME", str(tmp_path / "new"))
    answer = ask(capsys, recipe, "--stage", "sft", "--to", str(tmp_path / "other"), code=2)
    assert "stage sft is not done: sft/fetch (not made before), and 3 steps behind" in answer["error"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--stage: three ends with rm and dpo. Name one."),
        (("--stage", "dop"), "--stage: 'dop' is no stage of three. Did you mean dpo?"),
        (
            ("--stage", "rm", "--adapter"),
            "--adapter: stage rm trains whole weights (finetuning_type: full), there is no adapter. Leave it out.",
        ),
        (
            ("--dtype", "bf61", "--max-shard-size", "5", "--private"),
            "--dtype: 'bf61' is no dtype of saved weights. Did you mean bf16?\n"
            "--max-shard-size: '5' is not a size. Did you mean 5GB?\n"
            "--private: is about a repository of the hub. Name one with --push-to-hub.",
        ),
        (("--adapter", "--export-size", "5GB"), "an adapter is one file: peft reads no other"),
        (("--export_dir", "x"), "No such option: --export_dir"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(
    recipe: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert said in ask(capsys, recipe, *options, code=2)["error"]
    assert set(tmp_path.iterdir()) == before


def test_without_a_folder_named_it_is_made_here_and_progress_is_told(
    recipe: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flows.cli.exporting.SECONDS", 0.0)
    monkeypatch.setattr("flows.cli.exporting.LOG_SECONDS", 0.0)
    assert run_app(["export", recipe, "--stage", "sft"]) == 0
    told = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(told)) == ["checking", "writing", "reading back", str(tmp_path / "three-sft")]
    answer = ask(capsys, recipe, "--stage", "sft", code=2)
    assert "three-sft: is there and is not empty" in answer["error"]


@pytest.fixture
def hub() -> Iterator[tuple[str, type[TakingHub]]]:
    handler = taking_hub()
    with serving(handler) as address:
        yield address, handler


def test_a_push_sends_exactly_the_folder_and_the_token_is_nowhere(
    recipe: str, tmp_path: Path, hub: tuple[str, type[TakingHub]]
) -> None:
    address, handler = hub
    handler.known = "hf_nobodyMayReadThis"
    environment = {
        "HF_ENDPOINT": address,
        "HF_TOKEN": handler.known,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "LLAMATUNER_HOME": os.environ["LLAMATUNER_HOME"],
    }
    command = ["export", recipe, "--stage", "rm", "--to", str(tmp_path / "out"), "--push-to-hub", "acme/mine"]
    answer = run(*command, "--private", **environment)
    assert answer["commit"].startswith(f"{address}/acme/mine/commit/")
    assert handler.received == contents(tmp_path / "out")
    assert set(handler.received) == set(answer["files"])
    written = [*contents(tmp_path).values(), json.dumps(answer).encode()]
    assert not [data for data in written if handler.known.encode() in data]
    again = run(*command, code=2, **environment)
    assert "is not empty" in again["error"]


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for llama.cpp's converter, as a command."""
    path = tmp_path / "bin" / "convert-hf-to-gguf"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {PROJECT}/tests/tasks/converter.py "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv(PLACE, str(path))
    return path


def test_a_gguf_file_and_a_modelfile_stand_beside_the_weights(
    recipe: str, tmp_path: Path, capsys: Capture, converter: Path
) -> None:
    out = tmp_path / "out"
    answer = ask(capsys, recipe, "--stage", "dpo", "--to", str(out), "--ollama", "--gguf-type", "F32")
    made = {"file": "three-dpo-F32.gguf", "type": "f32", "tensors": 20, "modelfile": "Modelfile", "notes": []}
    assert answer["gguf"] == made
    assert {"three-dpo-F32.gguf", "Modelfile", "model.safetensors"} <= set(answer["files"])
    assert set(answer["files"]) == set(contents(out))
    head, _, rest = (out / "Modelfile").read_text().partition('TEMPLATE """')
    template, _, tail = rest.partition('"""\n')
    assert head == "# ollama create NAME -f Modelfile\nFROM ./three-dpo-F32.gguf\n"
    assert tail == 'PARAMETER stop """<|im_end|>"""\n'
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
    tokenizer = AutoTokenizer.from_pretrained(out)
    wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert written(template, talk) == wanted
    reader = GGUFReader(out / "three-dpo-F32.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    weights = load_file(out / "model.safetensors")
    assert (found["output_norm.weight"] == weights["model.norm.weight"].numpy()).all()


def test_what_a_gguf_file_lacks_is_said_before_anything_is_written(
    recipe: str, tmp_path: Path, capsys: Capture, converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("--to", str(tmp_path / "out"))
    answer = ask(capsys, recipe, "--stage", "rm", "--gguf", *to, code=2)
    assert answer["error"].startswith("--gguf: stage rm makes a reward model")
    answer = ask(capsys, recipe, "--stage", "dpo", "--gguf", "--adapter", "--gguf-type", "q4_0", *to, code=2)
    assert "--gguf: makes a file of a whole model, not of an adapter. Leave --adapter out." in answer["error"]
    assert "--gguf-type: 'q4_0' is no type that the converter writes." in answer["error"]
    answer = ask(capsys, recipe, "--stage", "dpo", "--gguf-type", "f16", *to, code=2)
    assert answer["error"] == "--gguf-type: is about a GGUF file. Add --gguf or --ollama."
    monkeypatch.setenv(PLACE, str(tmp_path))
    answer = ask(capsys, recipe, "--stage", "dpo", "--gguf", *to, code=2)
    assert "there is no convert_hf_to_gguf.py. Get llama.cpp (git clone" in answer["error"]
    assert not (tmp_path / "out").exists()


def test_a_converter_that_fails_leaves_no_folder_and_is_quoted(
    recipe: str, tmp_path: Path, capsys: Capture, converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WRONG, "fail")
    assert run_app(["export", recipe, "--stage", "dpo", "--gguf", "--to", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "convert-hf-to-gguf ended with exit code 1; its last lines:\nINFO: converting" in said
    assert "NotImplementedError: this model is not known" in said
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_the_process_that_exports_and_rounds_never_loads_torch(recipe: str, tmp_path: Path) -> None:
    code = "import sys; from flows.cli.app import run_app; print(run_app(sys.argv[1:]), 'torch' in sys.modules)"
    command = ["export", recipe, "--stage", "sft", "--dtype", "float16", "--to", str(tmp_path / "out")]
    ended = subprocess.run([sys.executable, "-c", code, *command], cwd=PROJECT, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "0 False"
