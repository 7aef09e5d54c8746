"""What a tokenize step leaves in MLflow: its numbers and their picture, also when it was done before."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow.tracking import MlflowClient

from flows.graph import build
from flows.mlflow_tree import MlflowTree
from registry.home import Home
from registry.loading import load_recipe
from tasks.tracking import Tracker
from tests.flows.test_artifacts_cli import make_data

PNG = b"\x89PNG\r\n\x1a\n"


def tracked(recipe: Path, *settings: str) -> dict[str, bytes]:
    """Make the data steps of a recipe and log them; files in the stage's run by path."""
    home, said = Home.open(), list[str]()
    pipeline = build(load_recipe(str(recipe), settings), home)
    tracker = Tracker(home, said.append)
    tree = MlflowTree(pipeline, tracker)
    tree.begin("record")
    for step, outcome in zip(pipeline.data_only().steps, make_data(recipe, *settings), strict=True):
        tree.ended(step, outcome)
    tree.end("FINISHED", {})
    assert said == []
    client = MlflowClient(f"sqlite:///{home.mlflow / 'mlflow.db'}")
    root = Path(client.get_run(tree.stage_runs["sft"] or "").info.artifact_uri.removeprefix("file://"))
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_statistics_and_their_picture_are_kept_for_every_tokenize_step(folder: Path) -> None:
    name, raw = "数 $a_$b ..", json.loads((folder / "toy.json").read_text())
    (folder / "held_out.jsonl").rename(folder / f"{name}.jsonl")
    raw["evaluation"]["perplexity"] = [f"{name}.jsonl"]
    (folder / "toy.json").write_text(json.dumps(raw))
    first, again = tracked(folder / "toy.json"), tracked(folder / "toy.json")
    assert again == first
    held_out = next(path.split("/")[1] for path in first if path.count("/") == 2)
    assert set(first) == {
        f"{place}/statistics.{ending}" for place in ("tokenize", f"tokenize/{held_out}") for ending in ("json", "png")
    }
    assert held_out.isascii()
    assert json.loads(first["tokenize/statistics.json"])["rows"] == 24
    assert json.loads(first[f"tokenize/{held_out}/statistics.json"])["rows"] == 6
    assert all(content.startswith(PNG) for path, content in first.items() if path.endswith(".png"))
