"""An exported folder: whole or absent, the same bytes each time, and what others load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from registry.errors import InputError
from registry.home import Home
from tasks.artifacts import Artifact, Store
from tasks.export import Exported, export, parse_dtype, parse_size, saved_dtype
from tasks.locks import try_lock
from tasks.train.output import ADAPTER_WEIGHTS
from tests.tiny import tiny_model

PROJECT = Path(__file__).parents[2]
CARD = "---\nlibrary_name: transformers\n---\n\n# a card\n"
WEIGHTS = 110192  # bytes of the tiny model's file


def silent(what: str, done: int, total: int) -> None:
    """Progress nobody looks at."""


def stored(home: Home, files: Path, key: str = "a" * 64) -> Artifact:
    """A folder as an artifact of the home."""
    output = home.path / "made"
    shutil.copytree(files, output)
    (output / "report").mkdir()
    (output / "report" / "program.log").write_text("a log")
    (output / "merge.json").write_text("{}")
    return Store(home).commit("merge", "toy", {"key": key, "step": "merge"}, output)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "chat_template.jinja").write_text("a template")
    return folder


@pytest.fixture
def here(home: Path) -> Home:
    home.mkdir()
    return Home(home)


@pytest.fixture
def artifact(here: Home, model: Path) -> Artifact:
    return stored(here, model)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def left_over(target: Path) -> list[str]:
    """What is beside the target and should not be."""
    return [path.name for path in target.parent.iterdir() if target.name in path.name]


def test_a_folder_has_what_others_need_and_nothing_of_ours(
    here: Home, artifact: Artifact, model: Path, tmp_path: Path
) -> None:
    files = export(Exported(artifact, tmp_path / "new" / "out"), CARD, here, silent)
    found = contents(tmp_path / "new" / "out")
    assert files == {name: len(data) for name, data in found.items()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert found["README.md"].decode() == CARD
    before = contents(model)
    assert all(found[name] == before[name] for name in found if name not in ("README.md", "model.safetensors"))
    weights, wanted = load_file(tmp_path / "new" / "out" / "model.safetensors"), load_file(model / "model.safetensors")
    assert list(weights) == list(wanted)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_two_exports_have_equal_bytes_and_leave_the_artifact_as_it_is(
    here: Home, artifact: Artifact, tmp_path: Path
) -> None:
    before = contents(artifact.path)
    for name in ("one", "two"):
        export(Exported(artifact, tmp_path / name, "bfloat16", 40_000), CARD, here, silent)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(artifact.path) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_torchs_rounding_of_every_weight_and_said_in_the_config(
    here: Home, artifact: Artifact, model: Path, tmp_path: Path, dtype: str
) -> None:
    export(Exported(artifact, tmp_path / "out", dtype), CARD, here, silent)
    wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(getattr(torch, dtype))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == getattr(torch, dtype)
    state = wanted.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", model))
    assert config == before | {"dtype": dtype}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 1}, {"a": 1, "dtype": "float16"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float16", "dtype": "float16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "kind": "x"}},
            {"dtype": "float16", "text_config": {"dtype": "float16", "kind": "x"}},
        ),
    ],
)
def test_a_config_says_the_dtype_whatever_it_said_before(
    here: Home, model: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps(before))
    export(Exported(stored(here, folder), tmp_path / "out", "float16"), CARD, here, silent)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == after


def test_weights_in_several_files_load_as_one_model(
    here: Home, artifact: Artifact, model: Path, tmp_path: Path
) -> None:
    files = export(Exported(artifact, tmp_path / "out", None, 40_000), CARD, here, silent)
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [name for name in sorted(files) if name.endswith(".safetensors")] == shards
    assert all(files[name] < 42_000 for name in shards)  # the header comes on top
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    state = load_file(model / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    placed = {name for name, file in index["weight_map"].items() if name in load_file(tmp_path / "out" / file)}
    assert placed == set(state) == set(index["weight_map"])
    ids = torch.arange(8)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "a template"


def test_an_adapter_is_one_file_and_names_its_base(here: Home, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, folder / ADAPTER_WEIGHTS)
    (folder / "adapter_config.json").write_text('{"r": 2, "base_model_name_or_path": "smollm2-135m-instruct"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "base.json").write_text("{}")  # says which weights the adapter belongs to, and stays with it
    (folder / "train.json").write_text("{}")
    made = stored(here, folder)
    assert saved_dtype(made) == "float32"
    files = export(Exported(made, tmp_path / "out", "bfloat16", None, "acme/base"), CARD, here, silent)
    assert set(files) == {"README.md", ADAPTER_WEIGHTS, "adapter_config.json", "tokenizer.json", "base.json"}
    assert load_file(tmp_path / "out" / ADAPTER_WEIGHTS)["base_model.model.q.lora_A.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {"r": 2, "base_model_name_or_path": "acme/base"}


def refusal(wanted: Exported, home: Home) -> str:
    before = left_over(wanted.target)
    with pytest.raises(InputError) as caught:
        export(wanted, CARD, home, silent)
    assert left_over(wanted.target) == before
    return str(caught.value)


def test_a_target_that_is_not_free_is_refused_and_left_alone(
    here: Home, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert "is not empty; an export never writes over anything. Name another" in refusal(
        Exported(artifact, target), here
    )
    assert contents(target) == {"notes.txt": b"mine"}
    assert "is there and is no folder" in refusal(Exported(artifact, target / "notes.txt"), here)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "is a mount point or the working folder" in refusal(Exported(artifact, tmp_path / "empty"), here)
    monkeypatch.chdir(tmp_path)
    assert len(export(Exported(artifact, tmp_path / "empty"), CARD, here, silent)) == 7


def test_too_little_room_is_found_before_anything_is_written(
    here: Home, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 10_000_000))
    assert "10 MB free on its disk, 50 MB needed. Free space" in refusal(Exported(artifact, tmp_path / "out"), here)


def test_an_artifact_whose_bytes_are_others_is_not_exported(here: Home, artifact: Artifact, tmp_path: Path) -> None:
    path = artifact.path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said = refusal(Exported(artifact, tmp_path / "out"), here)
    assert "model.safetensors has other content than its sha256 says. The artifact is damaged" in said
    path.write_bytes(b"\xff" * len(data))
    with pytest.raises(InputError, match=r"its weights cannot be read: .* The artifact is damaged"):
        saved_dtype(artifact)


def test_a_number_that_float16_cannot_hold_leaves_nothing_behind(here: Home, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(model, folder)
    state: dict[str, Any] = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = 1e6
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    said = refusal(Exported(stored(here, folder), tmp_path / "out", "float16"), here)
    assert said == (
        "--dtype float16: model.norm.weight holds 1e+06, which float16 cannot hold. Use bfloat16 or float32."
    )


def test_two_exports_do_not_write_one_folder(here: Home, artifact: Artifact, tmp_path: Path) -> None:
    target, said = tmp_path / "out", []

    def second(what: str, done: int, total: int) -> None:
        if what == "writing" and not said:
            said.append(refusal(Exported(artifact, target), here))

    export(Exported(artifact, target), CARD, here, second)
    assert said == [f"--to {target}: another export is writing it. Wait for it."]
    assert len(contents(target)) == 7


KILLED = """
import os, signal, sys
from pathlib import Path
from registry.home import Home
from tasks.artifacts import read_artifact
from tasks.export import Exported, export

def told(what, done, total):
    if what == sys.argv[3] and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

artifact = read_artifact(Path(sys.argv[1]))
export(Exported(artifact, Path(sys.argv[2])), "a card", Home.default(), told)
"""


@pytest.mark.parametrize("moment", ["writing", "reading back"])
def test_a_kill_half_way_leaves_no_folder_and_the_next_export_clears_up(
    here: Home, artifact: Artifact, tmp_path: Path, moment: str
) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(artifact.path), str(target), moment]
    ended = subprocess.run(command, cwd=PROJECT, env=os.environ | {"PYTHONPATH": str(PROJECT)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert left_over(target) == [".out.llamatuner-partial"]
    export(Exported(artifact, target), CARD, here, silent)
    assert left_over(target) == ["out"]
    assert (target / "model.safetensors").stat().st_size == WEIGHTS


def test_an_interruption_leaves_nothing(here: Home, artifact: Artifact, tmp_path: Path) -> None:
    def told(what: str, done: int, total: int) -> None:
        if what == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(Exported(artifact, tmp_path / "out"), CARD, here, told)
    assert left_over(tmp_path / "out") == []
    (lock,) = here.locks.glob("export-*.lock")
    with try_lock(lock) as free:
        assert free


def test_dtypes_and_sizes_are_read_as_people_write_them() -> None:
    assert [parse_dtype(text) for text in ("bfloat16", "fp16", "fp32")] == ["bfloat16", "float16", "float32"]
    assert [parse_size(text) for text in ("5GB", "1.5 gb", "300KB")] == [5 * 10**9, 15 * 10**8, 300_000]
    for text, cure in (("bfloat61", "Did you mean bfloat16"), ("int8", "Known: bf16, bfloat16")):
        with pytest.raises(InputError, match=cure):
            parse_dtype(text)
    for text, cure in (("5", "Did you mean 5GB"), ("0GB", "E.g. 5GB"), ("five", "E.g. 5GB"), ("5GiB", "E.g. 5GB")):
        with pytest.raises(InputError, match=cure):
            parse_size(text)
