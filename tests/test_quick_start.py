"""The quick start works as printed: every command, in its order, with a tiny model in place of the published one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import Server, server  # noqa: F401 - a fixture of this file too
from tests.test_documents import PROJECT
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
MODEL = "smollm2-135m-instruct"
PAGE = PROJECT / "docs" / "quick-start.md"
LONGEST = 900.0  # seconds for one block, on a machine that has much else to do


def test_every_command_of_the_quick_start_does_what_the_page_says(tmp_path: Path, server: Server) -> None:  # noqa: F811
    tiny_model(tmp_path / "model")
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert sum("llamatuner " in block for block in blocks) == len(blocks) - 1  # and one that writes the rows
    said = {}
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block.replace(MODEL, str(tmp_path / "model"))],
            cwd=tmp_path,
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(PROJECT),
                "LLAMATUNER_HOME": str(tmp_path / "home"),
                "PREFECT_API_URL": server.url,
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=LONGEST,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        said[block.strip().splitlines()[-1]] = said.get(block, "") + done.stdout + done.stderr
    assert "bakery: good" in said["llamatuner plan bakery.yaml"]
    assert "⟦We open at 6 in the morning" in said["llamatuner plan bakery.yaml"]
    assert "up to date: nothing to do" in said["llamatuner run bakery.yaml"]  # the second time
    other = said[f"llamatuner run bakery.yaml --set {re.findall(r'stages.sft.learning_rate=[0-9e-]+', page)[0]}"]
    assert set(re.findall(r"^(\S+) +ran ", other, re.MULTILINE)) == {"sft/train", "sft/merge", "sft/evaluate"}
    assert "train: train.learning_rate" in said["llamatuner compare bakery~1 bakery"]
    assert said['echo "Do you deliver?" | llamatuner chat bakery.yaml'].strip()
    assert (tmp_path / "bakery-model" / "model.safetensors").is_file()
