"""Every stage and method has a page whose rows are read, whose recipe runs, and which names the settings of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from registry.combinations import NEEDS
from registry.core import read_yaml
from registry.stages import METHODS, STAGES
from tasks.formats import detect
from tests.flows.conftest import Server, server  # noqa: F401 - a fixture of this file too
from tests.flows.twins import TINY, work_here
from tests.tiny import tiny_model

DOCS = Path(__file__).parents[1] / "docs"
STAGE_PAGES = {name: DOCS / "stages" / f"{name}.md" for name in STAGES}
METHOD_PAGES = {name: DOCS / "methods" / f"{name}.md" for name in (*METHODS, "qlora")}
PAGES = STAGE_PAGES | METHOD_PAGES


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def own_settings(key: str, name: str) -> set[str]:
    """Settings that have an effect with this stage (or method) and not with all of them, without those of rows."""
    registry = {"stage": STAGES, "finetuning_type": METHODS}[key]
    return {
        setting
        for need in NEEDS
        if name in need.where.get(key, ()) and len(need.where[key]) < min(len(registry), 6)
        for setting in need.settings
    }


def test_there_is_a_page_for_each_and_for_nothing_else() -> None:
    assert {path.stem for path in (DOCS / "stages").iterdir()} == set(STAGES)
    assert {path.stem for path in (DOCS / "methods").iterdir()} == set(METHOD_PAGES)


@pytest.mark.parametrize("name", STAGES)
def test_the_row_of_a_page_is_read_by_its_stage(name: str) -> None:
    (row,) = blocks(STAGE_PAGES[name], "json")
    form = detect(json.loads(row), STAGES[name].shape)
    assert form is not None
    assert form.holds == STAGES[name].shape or name in ("ppo", "grpo", "rloo")  # rows with answers have prompts too


@pytest.mark.parametrize(
    ("key", "name"), [*(("stage", name) for name in STAGES), *(("finetuning_type", name) for name in METHODS)]
)
def test_a_page_names_the_settings_of_its_own(key: str, name: str) -> None:
    texts = [PAGES[name].read_text(encoding="utf-8")]
    if name == "lora":
        texts.append(PAGES["qlora"].read_text(encoding="utf-8"))
    missing = {setting for setting in own_settings(key, name) if not any(f"`{setting}`" in text for text in texts)}
    assert missing - {"sample_steps"} == set()


@pytest.mark.slow
def test_the_recipe_of_every_page_runs_as_its_command_says(
    tmp_path: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMATUNER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    work_here(monkeypatch)
    for name, page in PAGES.items():
        (text,) = blocks(page, "yaml")
        assert text.startswith(f"# {name}.yaml\n")
        raw: dict[str, Any] = read_yaml(text, name)
        Path(f"{name}.yaml").write_text(json.dumps(small(raw, tmp_path / "model")))
        (commands,) = blocks(page, "bash")
        for command in commands.splitlines():
            program, *words = command.split()
            assert program == "llamatuner"
            assert run_app(words) == 0, f"{command}: {capsys.readouterr().err}"


def small(raw: dict[str, Any], model: Path) -> dict[str, Any]:
    """A recipe with little to do, on a tiny model."""
    tiny = {key: value for key, value in TINY.items() if key != "lora_rank" or raw["finetuning_type"] == "lora"}
    common = {key: value for key, value in raw.items() if key not in tiny}
    stages = {stage: settings | tiny for stage, settings in raw["stages"].items()}
    return common | {"model_name_or_path": str(model), "stages": stages}
