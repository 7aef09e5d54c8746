"""Every test has a home of its own, no network, and telemetry off."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
from absl.logging import get_absl_handler

pytest.register_assert_rewrite("tests.flows.processes", "tests.flows.refusals", "tests.flows.toy")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and on matrices this small threads wait for each other
# Its handler (rouge-score brings it) closes the stream it was made with when somebody configures logging anew, as
# Prefect does; only the process's own it never closes. Of a test it would be the one in which pytest keeps output.
get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that of two processes none is left with one of minutes at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is imported by now stays: a Trainer collects garbage when it begins, and need not walk through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh LLAMATUNER_HOME; no server, no hub."""
    path = tmp_path / "home"
    monkeypatch.setenv("LLAMATUNER_HOME", str(path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return path
