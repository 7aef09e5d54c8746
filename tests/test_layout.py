"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ORDER = ("registry", "tasks", "flows", "deployments")
SHADOWS = {
    "tokenize",
    "datasets",
    "evaluate",
    "types",
    "logging",
    "select",
    "queue",
    "random",
    "signal",
    "copy",
    "json",
}
SOURCES = sorted(path for package in ORDER for path in (PROJECT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 50


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_dependencies_point_one_way_and_files_stay_short(path: Path) -> None:
    package = path.relative_to(PROJECT).parts[0]
    later = set(ORDER[ORDER.index(package) + 1 :])
    assert imported(path) & later == set()
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert path.stem not in SHADOWS
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, node.name


def loaded(code: str) -> set[str]:
    """Which of the heavy libraries a piece of code loads."""
    heavy = ("torch", "transformers", "datasets", "mlflow", "prefect", "trl", "peft", "pandas")
    probe = f"import sys; {code}; print(*[name for name in {heavy!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=PROJECT)
    return set(answer.stdout.split())


def test_looking_and_planning_load_nothing_heavy() -> None:
    assert (
        loaded(
            "import flows.cli.app, flows.cli.chatting, flows.cli.deploying, flows.cli.exporting, flows.cli.looking, "
            "flows.cli.running, flows.cli.scoring, flows.cli.serving, flows.cli.sweeping, flows.cli.talking, "
            "flows.planning, flows.sweep_picture, flows.sweep_record"
        )
        == set()
    )


def test_the_process_of_a_flow_never_loads_torch() -> None:
    assert loaded("import flows.pipeline, tasks.tracking, mlflow.tracking") <= {"prefect", "mlflow", "pandas"}
    sweeping = "import optuna.importance, optuna.storages._rdb.storage, sklearn.ensemble"
    assert loaded(sweeping) <= {"pandas"}


def test_our_packages_are_found_and_not_the_tests_folders() -> None:
    import flows
    import registry
    import tasks

    assert {Path(str(m.__file__)).parent for m in (registry, tasks, flows)} == {PROJECT / n for n in ORDER[:3]}


def test_nothing_dangerous_is_used() -> None:
    calls = ("eval", "exec")
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, path
            if isinstance(node, ast.ExceptHandler):
                assert not all(isinstance(line, ast.Pass) for line in node.body), path
