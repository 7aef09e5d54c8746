"""Two machines, which are two homes, with one store and one Prefect server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import Server
from tests.flows.processes import adapter
from tests.flows.toy import LONGEST, run, start, states, toy_recipe
from tests.s3_server import SECRET, S3Server

DATA = {f"sft/{kind}{which}" for kind in ("fetch", "render", "tokenize") for which in ("", ":held_out")}


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    """An empty store."""
    found = S3Server(tmp_path / "s3" / "root")
    found.start()
    yield found
    found.stop()


@pytest.fixture
def common(s3: S3Server, server: Server) -> dict[str, str]:
    """What both machines have in their environment."""
    return s3.environment | {"LLAMATUNER_STORE": s3.store, "PREFECT_API_URL": server.url}


def machine(common: dict[str, str], folder: Path) -> dict[str, str]:
    """The environment of one of them."""
    return common | {"LLAMATUNER_HOME": str(folder)}


def kinds(home: Path) -> set[str]:
    """Steps of which a home has artifacts."""
    return {path.parent.name for path in (home / "artifacts").glob("*/*")}


def test_two_pipelines_at_the_same_time_make_what_they_share_once(common: dict[str, str], tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path / "recipe")
    homes, rates = [tmp_path / "one", tmp_path / "two"], ["0.01", "0.02"]
    commands = [
        start("prepare", str(recipe), "--set", f"stages.sft.learning_rate={rate}", "--json", **machine(common, home))
        for home, rate in zip(homes, rates, strict=True)
    ]
    made: dict[str, list[str]] = {}
    for command in commands:
        out, err = command.communicate(timeout=LONGEST)
        assert command.returncode == 0, err
        for title, state in states(json.loads(out)).items():
            made.setdefault(title, []).append(state)
    assert {title: sorted(found) for title, found in made.items()} == {title: ["cached", "ran"] for title in DATA}
    files = [
        {path.relative_to(home): path.read_bytes() for path in home.glob("artifacts/**/*.arrow")} for home in homes
    ]
    assert files[0] == files[1]
    assert len(files[0]) >= len(DATA)


@pytest.mark.slow
def test_a_second_machine_fetches_the_model_and_goes_on_from_there(
    common: dict[str, str], tmp_path: Path, s3: S3Server
) -> None:
    recipe, one, two = toy_recipe(tmp_path / "recipe"), tmp_path / "one", tmp_path / "two"
    first = run("run", str(recipe), **machine(common, one))
    assert set(states(first).values()) == {"ran"}
    plan = run("plan", str(recipe), **machine(common, two))
    assert set(states(plan).values()) == {"shared"}
    second = run("run", str(recipe), **machine(common, two))
    assert set(states(second).values()) == {"cached"}
    assert (second["status"], second["results"]) == ("completed", first["results"])
    assert [step["digest"] for step in second["steps"]] == [step["digest"] for step in first["steps"]]
    assert adapter(two) == adapter(one)
    assert kinds(two) == {"train", "merge", "evaluate"}
    assert run("run", str(recipe), **machine(common, two))["status"] == "up-to-date"
    other = run("run", str(recipe), "--set", "stages.sft.learning_rate=0.02", **machine(common, two))
    ran = {title for title, state in states(other).items() if state == "ran"}
    assert ran == {"sft/train", "sft/merge", "sft/evaluate"}
    assert kinds(two) == {"train", "merge", "evaluate", "tokenize"}  # the rows that were trained on, and no others
    texts = [path.read_bytes() for path in (*one.rglob("*"), *two.rglob("*"), *s3.kept().values()) if path.is_file()]
    assert not any(SECRET.encode() in text for text in texts)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("s3://me:hidden-word@bucket/x", "has credentials in it"),
        ("gs://bucket/x", "the package for gs:// is not installed. pip install gcsfs=="),
    ],
)
def test_a_store_that_cannot_be_used_ends_the_run_before_it_starts(tmp_path: Path, url: str, wanted: str) -> None:
    recipe, home = toy_recipe(tmp_path / "recipe"), tmp_path / "one"
    answer = json.dumps(run("run", str(recipe), code=2, LLAMATUNER_HOME=str(home), LLAMATUNER_STORE=url))
    assert wanted in answer
    assert "hidden-word" not in answer
    assert not (home / "runs").exists()
