"""What the tests of bad input share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a refused command says to people; the same is said to machines, in one line."""
    capsys.readouterr()
    code = run_app([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert "Traceback" not in err
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer["status"] == "failed"
    for problem in answer["problems"]:
        assert set(problem) == {"where", "rule", "cure"}
        assert problem["rule"]
        assert problem["rule"] in answer["error"]
    return err


def nothing_begun(home: Path) -> bool:
    """No artifact, no unfinished work, no record of a run, no Prefect and no MLflow database."""
    names = ("artifacts", "work", "runs", "prefect", "mlflow")
    return not any((home / name).exists() for name in names)


def write_lines(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
