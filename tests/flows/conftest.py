"""A good recipe to spoil, and a Prefect server for runs that need none of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from flows.prefect_server import prefect_api
from registry.home import Home
from tasks.devices import cuda_devices
from tests.flows.processes import prefect_database
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


class Server(NamedTuple):
    """A Prefect server that outlives runs, as people have it who set PREFECT_API_URL."""

    url: str
    database: Path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this process: to start one takes longer than most of what is asked of it."""
    home, before = tmp_path_factory.mktemp("server"), dict(os.environ)
    os.environ.pop("PREFECT_API_URL", None)
    with prefect_api(Home(home)) as url:
        os.environ.clear()
        os.environ.update(before)  # tests say themselves which server they use
        # Prefect in this process keeps the settings it was imported with, which may have been before there was a server
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: url}):
            yield Server(url, prefect_database(home))
