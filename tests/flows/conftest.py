"""A good recipe to spoil."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.devices import cuda_devices
from tests.flows.toy import toy_recipe


@pytest.fixture(scope="session")
def good_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good recipe with its model and data; tests change copies of it."""
    return toy_recipe(tmp_path_factory.mktemp("good") / "recipe", packing=False).parent


@pytest.fixture
def folder(good_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a good recipe `toy.json`, in which the test stands."""
    shutil.copytree(good_recipe, tmp_path / "recipe")
    monkeypatch.chdir(tmp_path / "recipe")
    cuda_devices.cache_clear()
    yield tmp_path / "recipe"
    cuda_devices.cache_clear()
