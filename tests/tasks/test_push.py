"""Pushing a folder: the real client against a hub on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from registry.errors import InputError
from tasks.push import PushFailed, open_repository, push_folder
from tests.small_hub import COMMIT, TakingHub, serving, taking_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[TakingHub]]:
    handler = taking_hub()
    with serving(handler) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", handler.known)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # weights by LFS, which the small hub speaks
        yield handler


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".").replace("_", "-")).write_text(text)
    return path


def test_a_push_makes_the_repository_hold_the_folders_files(hub: type[TakingHub], tmp_path: Path) -> None:
    open_repository("acme/mine", private=True)
    assert [(made["organization"], made["name"], made["visibility"]) for made in hub.created] == [
        ("acme", "mine", "private")
    ]
    folder = folder_with(tmp_path / "out", README__md="a card", config__json="{}", model__safetensors="weights")
    assert push_folder(folder, "acme/mine", "a message").endswith(f"/acme/mine/commit/{COMMIT}")
    assert hub.received == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert list(hub.objects.values()) == [b"weights"]  # the others are in the commit itself


def test_weights_of_an_earlier_push_go_and_other_files_stay(hub: type[TakingHub], tmp_path: Path) -> None:
    old = ("model.safetensors", "adapter_config.json", ".gitattributes", "picture.png", "README.md")
    hub.received |= dict.fromkeys(old, b"old")
    files = {
        "README__md": "new",
        "model_00001_of_00001__safetensors": "weights",
        "model__safetensors__index__json": "{}",
    }
    push_folder(folder_with(tmp_path / "out", **files), "acme/mine", "a message")
    assert hub.received == {
        ".gitattributes": b"old",
        "picture.png": b"old",
        "README.md": b"new",
        "model-00001-of-00001.safetensors": b"weights",
        "model.safetensors.index.json": b"{}",
    }


def refusal(repo: str, private: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        open_repository(repo, private)
    return str(caught.value)


def test_a_repository_that_is_public_is_not_taken_for_a_private_one(hub: type[TakingHub]) -> None:
    assert refusal("acme/open", private=True) == (
        "--private: acme/open is there and is public. Make it private on the hub, or name another repository."
    )
    open_repository("acme/open", private=False)


def test_what_is_wrong_is_found_before_anything_is_sent(hub: type[TakingHub], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'mine' is not a repository's name. Write it as owner/name." in refusal("mine")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    said = refusal("acme/mine")
    assert "refuses acme/mine" in said
    assert "Check HF_TOKEN" in said
    assert "hf_unknown" not in said
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the hub is there. Run `hf auth login`, or set HF_TOKEN." in refusal("acme/mine")
    monkeypatch.setenv("HF_TOKEN", hub.known)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached (http://127.0.0.1:9" in refusal("acme/mine")
    assert hub.received == {}


def test_a_push_that_fails_says_how_to_send_the_folder(
    hub: type[TakingHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "out", README__md="a card")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(
        PushFailed, match=r"was not sent: .*401.* The folder is whole; send it with `hf upload"
    ) as caught:
        push_folder(folder, "acme/mine", "a message")
    assert "hf_unknown" not in str(caught.value)
