"""What counts as data that have changed, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.cli.app import run_app
from registry.home import Home
from tests.flows.conftest import Server
from tests.flows.toy import toy_recipe, write_rows
from tests.small_hub import hub_of, serving

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]


def prepared(folder: Path, server: Server, patch: pytest.MonkeyPatch, dataset: str) -> str:
    """A recipe whose data are prepared in the home."""
    recipe = toy_recipe(folder / "recipe", dataset=dataset)
    raw = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({name: value for name, value in raw.items() if name != "evaluation"}))
    patch.setenv("PREFECT_API_URL", server.url)
    assert run_app(["prepare", str(recipe)]) == 0
    return str(recipe)


def changed(recipe: str, *overrides: str) -> str | None:
    """What changed, as the flow finds it; Prefect keeps the address of the first server it hears of."""
    from flows.watching import changed_data

    return changed_data(recipe, list(overrides), Home.default())


def test_rows_and_how_they_are_read_count_and_training_does_not(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared(tmp_path, server, monkeypatch, "train.jsonl")
    assert changed(recipe) is None
    assert changed(recipe, "stages.sft.learning_rate=1e-4") is None
    why = changed(recipe, "stages.sft.cutoff_len=128")
    assert why == "sft/tokenize: cutoff_len 160 → 128"
    with open(tmp_path / "recipe" / "train.jsonl", "a") as rows:
        rows.write('{"instruction": "say new", "output": "new"}\n')
    assert changed(recipe) == "sft/fetch: train changed"


def test_a_branch_of_the_hub_that_has_moved_on_is_downloaded_anew(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", 8)
    with serving(hub_of(datasets_rows=tmp_path / "rows")) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        recipe = prepared(tmp_path, server, monkeypatch, "acme/rows")
        assert changed(recipe) is None
        monkeypatch.setattr("tests.small_hub.COMMIT", "9" * 40)
        assert changed(recipe) == "acme/rows went from commit 01234567 to 99999999"
        assert str(changed(recipe)).startswith("sft/download:rows: not made before")
