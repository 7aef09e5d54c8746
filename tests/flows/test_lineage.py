"""From a model back to data and code, and from data to every model that has seen them.

One decision: one home of real runs is made for the whole file; what no short run can make (a judge, a reference) is a
store of small artifacts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run_app
from flows.lineage import REFERENCE, REWARD, STARTS, TRAINED, WATCHED, Lineage, Use
from registry.home import Home
from tasks.artifacts import Artifact, Store
from tests.flows.conftest import Server
from tests.flows.test_chains import write_pairs
from tests.flows.toy import toy_recipe, write_rows
from tests.flows.twins import work_here

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
Answer = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A folder with recipes, and a home in which they are done: `chain` (sft → dpo, and a reward model on the same
    pairs), promoted; and `onward`, which starts from the exported sft model."""
    root = tmp_path_factory.mktemp("lineage")
    folder = root / "recipe"
    toy_recipe(folder)
    write_pairs(folder / "pairs.jsonl", 12, "pair")
    write_rows(folder / "more.jsonl", 8, "more")
    common = {"cutoff_len": 160, "learning_rate": 1e-3, "max_steps": 2, "lora_rank": 4}
    chain = common | {
        "name": "chain",
        "model_name_or_path": "model",
        "stages": {
            "sft": {"stage": "sft", "dataset": "train.jsonl"},
            "rm": {"stage": "rm", "dataset": "pairs.jsonl", "finetuning_type": "full"},
            "dpo": {"stage": "dpo", "model": "sft", "dataset": "pairs.jsonl", "val_size": 3},
        },
        "evaluation": {"perplexity": ["held_out.jsonl"]},
    }
    (folder / "chain.json").write_text(json.dumps(chain))
    onward = common | {"name": "onward", "model_name_or_path": "exported", "stage": "sft", "dataset": "more.jsonl"}
    (folder / "onward.json").write_text(json.dumps(onward))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMATUNER_HOME", str(root / "home"))
        patch.setenv("PREFECT_API_URL", server.url)
        work_here(patch)
        assert run_app(["run", str(folder / "chain.json")]) == 0
        assert run_app(["promote", "chain:dpo", "--gate", "perplexity.held_out > 0"]) == 0
        assert run_app(["export", str(folder / "chain.json"), "--stage", "sft", "--to", str(folder / "exported")]) == 0
        assert run_app(["run", str(folder / "onward.json")]) == 0
    return root


@pytest.fixture
def recipes(made: Path, home: Path) -> Path:
    """The recipes' folder; what was done is in a home of the test's own."""
    shutil.copytree(made / "home", home, symlinks=True)
    return made / "recipe"


def ask(capsys: Capture, what: str | Path, code: int = 0) -> tuple[Answer, str]:
    """The answer, and what people read."""
    capsys.readouterr()
    assert run_app(["lineage", str(what), "--json"]) == code
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    answer: Answer = json.loads(out)
    return answer, err


def nodes(node: Answer) -> Iterator[Answer]:
    yield node
    for each in node.get("inputs", []):
        yield from nodes(each)


def uses(models: list[Answer]) -> dict[str, list[tuple[str, list[str]]]]:
    """Label of a model → what it has to do with the data, and through which models."""

    def label(name: str) -> str:
        return Path(name).name if name.startswith("/") else name.partition("/")[2].rpartition("-")[0]

    return {
        label(each["name"]): [(use["use"], [label(via) for via in use["via"]]) for use in each["uses"]]
        for each in models
    }


def artifact(home: Path, step: str, label: str) -> Artifact:
    (found,) = (each for each in Store(Home(home)).all() if each.step == step and each.manifest["label"] == label)
    return found


def test_a_model_is_traced_to_data_code_and_base_without_its_recipe(recipes: Path, home: Path, capsys: Capture) -> None:
    answer, told = ask(capsys, "chain:dpo")
    tree = answer["tree"]
    assert (answer["kind"], tree["step"], tree["key"]) == ("model", "merge", artifact(home, "merge", "chain-dpo").key)
    steps = [(node["role"], node["step"], node["facts"]["stage"]) for node in nodes(tree) if "facts" in node]
    assert steps == [
        ("", "merge", "dpo"),
        ("adapter", "train", "dpo"),
        ("shards", "tokenize", "dpo"),
        ("rendered", "render", "dpo"),
        ("rows", "fetch", "dpo"),
        ("base", "merge", "sft"),
        ("adapter", "train", "sft"),
        ("shards", "tokenize", "sft"),
        ("rendered", "render", "sft"),
        ("rows", "fetch", "sft"),
    ]
    shown = [node for node in nodes(tree) if not node["shown_before"]]
    assert [node["name"] for node in shown if node["state"] == "folder"] == [str(recipes / "model")]  # once
    train = tree["inputs"][0]["facts"]
    assert (train["kind"], train["method"], train["numbers"]["steps"]) == ("dpo", "lora", 2)
    assert (train["settings"]["learning_rate"], train["settings"]["pref_beta"]) == (1e-3, 0.1)
    assert set(train["packages"]) >= {"torch", "transformers", "peft"}
    assert len(train["template_sha256"]) == 64
    (source,) = next(node for node in nodes(tree) if node["role"] == "rows")["facts"]["sources"]
    assert (source["name"], source["rows"], source["kept_back"]) == ("pairs", 9, 3)
    assert source["files"] == [str(recipes / "pairs.jsonl")]
    assert "stage dpo, lora, steps 2" in told
    assert "learning_rate 0.001" in told
    own = [line for line in told.splitlines() if str(recipes) not in line]
    assert max(len(line) for line in own) <= 80


def test_a_model_says_what_measured_it_which_run_made_it_and_that_it_is_the_champion(
    recipes: Path, home: Path, capsys: Capture
) -> None:
    answer, told = ask(capsys, "chain")  # the stage measured last
    (run,) = answer["runs"]
    assert (run["recipe"], run["stage"], run["status"], run["made"]) == ("chain", "dpo", "completed", True)
    record = json.loads((home / "runs" / f"{run['id']}.json").read_text())
    numbers = [each for measured in answer["measured"] for each in measured["numbers"]]
    assert len(answer["measured"]) == 2  # the evaluation, and the implicit rewards that are made of two of them
    assert {each["metric"]: each["value"] for each in numbers} == {
        name: result["value"] for name, result in record["results"]["dpo"].items() if not name.startswith("train.")
    }
    assert all(each["low"] <= each["value"] <= each["high"] for each in numbers)
    (version,) = answer["registered"]
    assert version == {"name": "chain-dpo", "version": "1", "champion": "now", "gate": "passed"}
    assert "registered as chain-dpo version 1, the champion" in told
    assert ask(capsys, "chain:sft")[0]["registered"][0]["champion"] is None


def test_one_model_has_many_names(recipes: Path, home: Path, tmp_path: Path, capsys: Capture) -> None:
    dpo, sft = artifact(home, "merge", "chain-dpo"), artifact(home, "merge", "chain-sft")
    run = ask(capsys, "chain")[0]["runs"][0]["id"]
    for name in (
        run,
        f"{run}:dpo",
        dpo.key[:10],
        dpo.path.name,
        str(dpo.path),
        "models:/chain-dpo@champion",
        "models:/chain-dpo/1",
    ):
        assert ask(capsys, name)[0]["key"] == dpo.key
    answer, _ = ask(capsys, recipes / "exported")
    assert (answer["key"], answer["notes"]) == (sft.key, [f"{recipes / 'exported'}: known by its weights"])
    other = tmp_path / "other"
    command = ["export", str(recipes / "chain.json"), "--stage", "dpo", "--dtype", "bfloat16", "--to", str(other)]
    assert run_app(command) == 0
    answer, _ = ask(capsys, other)
    assert answer["key"] == dpo.key
    assert "by its card alone" in answer["notes"][0]
    (other / "README.md").unlink()
    answer, _ = ask(capsys, other, code=2)
    assert "no artifact has these weights" in answer["error"]


def test_data_name_every_model_that_saw_them_and_how(recipes: Path, home: Path, capsys: Capture) -> None:
    answer, told = ask(capsys, recipes / "train.jsonl")
    assert uses(answer["models"]) == {
        "chain-sft": [("trained on", [])],
        "chain-dpo": [(STARTS, ["chain-sft"])],
        "onward-sft": [(STARTS, ["chain-sft"])],  # through a folder that was exported
    }
    assert "the champion" in told
    answer, _ = ask(capsys, "pairs")
    assert uses(answer["models"]) == {
        "chain-dpo": [("trained on", []), ("measured on", []), ("measured on", [])],  # the second: implicit rewards
        "chain-rm": [("trained on", [])],
        "chain-sft": [("measured on", [])],  # what dpo started from, on the pairs kept back
    }
    for name in ("pairs.jsonl", str(artifact(home, "fetch", "held_out").path)):
        assert ask(capsys, name)[0]["kind"] == "data"
    answer, told = ask(capsys, "held_out")
    assert {name: [use for use, _ in found] for name, found in uses(answer["models"]).items()} == {
        "chain-dpo": ["measured on"],
        "chain-sft": ["measured on", "measured on"],
        "model": ["measured on"],
    }
    number = answer["models"][0]["uses"][0]["numbers"][0]
    assert (number["metric"], number["rows"]) == ("perplexity.held_out", 6)
    assert answer["unknown"] == []
    assert max(len(line) for line in told.splitlines() if str(recipes) not in line) <= 80


@pytest.mark.parametrize("name", ["other.jsonl", "other.txt", "withdrawn"])
def test_a_renamed_copy_of_a_file_is_the_same_data(recipes: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    copy = tmp_path / name
    shutil.copyfile(recipes / "train.jsonl", copy)
    expected = ask(capsys, "train")[0]
    answer, _ = ask(capsys, copy)
    assert answer["models"] == expected["models"]
    digest = answer["files"][str(copy)]
    assert ask(capsys, digest[:12])[0]["models"] == expected["models"]
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copyfile(copy, folder / "rows.jsonl")
    assert ask(capsys, folder)[0]["models"] == expected["models"]


def test_a_file_that_has_grown_is_said_to_be_partly_what_was_trained_on(
    recipes: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, capsys: Capture
) -> None:
    for name in ("chain.json", "train.jsonl", "held_out.jsonl", "pairs.jsonl"):
        shutil.copyfile(recipes / name, tmp_path / name)
    (tmp_path / "model").symlink_to(recipes / "model")
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    assert run_app(["prepare", str(tmp_path / "chain.json")]) == 0  # reads the copies, and finds all done
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"instruction": "one more", "output": "row"}\n')
    for _ in range(2):  # to ask changes nothing
        answer, told = ask(capsys, tmp_path / "train.jsonl")
        assert (answer["read_into"], answer["models"]) == ([], [])
        (partly,) = answer["partly"]["read_into"]
        assert partly["key"] == artifact(home, "fetch", "train").key
        assert "24 of its 24 rows are known to stand there unchanged" in partly["how"]
        assert set(uses(answer["partly"]["models"])) == {"chain-sft", "chain-dpo", "onward-sft"}
        assert "of which a part is the same" in told
    unread = write_rows(tmp_path / "unread.jsonl", 3, "never")
    answer, _ = ask(capsys, unread)
    assert (answer["models"], answer["partly"]["models"]) == ([], [])
    assert answer["notes"] == ["no run of this home has read these data, as far as its artifacts go back"]


def test_what_is_gone_or_damaged_is_said_and_the_rest_is_shown(recipes: Path, home: Path, capsys: Capture) -> None:
    sft, fetched = artifact(home, "train", "chain-sft"), artifact(home, "fetch", "train")
    (sft.path / "adapter_model.safetensors").unlink()
    shutil.rmtree(fetched.path)
    answer, told = ask(capsys, "chain:dpo")
    states = {node["name"]: node["state"] for node in nodes(answer["tree"])}
    assert states[f"train/{sft.path.name}"] == "damaged: adapter_model.safetensors is missing"
    assert states[f"fetch/{fetched.path.name}"] == "gone"
    assert f"gone (key {fetched.key[:12]})" in told
    assert str(recipes / "model") in states  # behind them
    answer, told = ask(capsys, "pairs")
    gone = {each["name"].rpartition("-")[0]: each["gone"] for each in answer["unknown"]}
    assert gone == {"merge/chain-sft": [fetched.key], "merge/onward-sft": [fetched.key]}
    assert "not known of merge/chain-sft" in told
    Store(Home(home)).set_aside_if_damaged("train", sft.key)
    answer, _ = ask(capsys, "chain:sft")
    aside = answer["tree"]["inputs"][0]
    assert aside["state"] == "set aside as damaged: adapter_model.safetensors is missing"
    assert aside["facts"]["kind"] == "sft"
    shutil.rmtree(artifact(home, "merge", "chain-sft").path)
    shutil.rmtree(home / "damaged")
    answer, _ = ask(capsys, "chain:sft", code=2)
    assert "what it made is gone" in answer["error"]
    assert ask(capsys, "chain:dpo")[0]["tree"]["inputs"][1]["state"] == "gone"


def test_content_that_is_there_under_another_key_is_not_gone(recipes: Path, home: Path, capsys: Capture) -> None:
    fetched = artifact(home, "fetch", "train")
    manifest = fetched.manifest | {"key": "ab" * 32}
    fetched.path.joinpath("manifest.json").write_text(json.dumps(manifest))
    fetched.path.rename(fetched.path.with_name("train-abababababab"))
    answer, told = ask(capsys, "chain:sft")
    found = next(node for node in nodes(answer["tree"]) if node["role"] == "rows")
    assert (found["key"], found["instead_of"], found["state"]) == ("ab" * 32, fetched.key, "whole")
    assert f"the same content as what is gone (key {fetched.key[:12]})" in told


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("chian", "no run, recipe, artifact, file or data set has that name. Did you mean chain?"),
        ("chain:dpp", "trained nothing. Did you mean dpo?"),
        ("models:/chain-dpp@champion", "Did you mean chain-dpo"),
        ("models:/chain-dpo", "is no address of a registered model"),
        ("20", "run 20"),
    ],
)
def test_a_name_of_nothing_or_of_several_things_is_refused(
    recipes: Path, capsys: Capture, what: str, words: str
) -> None:
    answer, _ = ask(capsys, what, code=2)
    assert words in answer["error"]


def test_a_word_that_is_a_recipe_and_a_data_set_is_not_guessed(recipes: Path, home: Path, capsys: Capture) -> None:
    path = artifact(home, "fetch", "train").path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label": "chain"}))
    answer, _ = ask(capsys, "chain", code=2)
    assert "stands for 2 things: run " in answer["error"]
    assert "data set chain" in answer["error"]


def test_a_model_knows_its_judge_its_reference_and_what_it_was_measured_on(home: Path, tmp_path: Path) -> None:
    store, number = Store(Home(home)), iter(range(100))

    def make(step: str, **inputs: Artifact) -> Artifact:
        output = tmp_path / f"output{next(number)}"
        output.mkdir()
        (output / "model.safetensors").write_text(output.name)
        key = f"{next(number):02d}" * 32
        given = {
            name.replace("__", "."): {"digest": a.digest, "key": a.key, "artifact": f"{a.step}/{a.path.name}"}
            for name, a in inputs.items()
        }
        manifest = {"key": key, "step": step, "stage": "s", "label": step, "inputs": given, "created": key}
        return store.commit(step, step, manifest, output)

    rows, others = make("fetch"), make("fetch")
    tokens, more = (make("tokenize", rendered=make("render", rows=each)) for each in (rows, others))
    judge = make("train", shards=tokens)
    taught = make("train", shards=more, reward_model=judge)
    after = make("train", shards=more, base=taught)
    close = make("merge", adapter=make("train", shards=more, reference=judge), base=after)
    watched = make("train", shards=more, held_out__0=tokens)
    lineage, data = Lineage(Home(home)), frozenset({rows.key})
    via = {each.key: lineage.name(each.key) for each in (judge, taught, after)}
    found = {each.key: lineage.seen(each.key, data, {}).uses for each in (judge, taught, after, close, watched)}
    assert found[judge.key] == {Use(TRAINED)}
    assert found[taught.key] == {Use(REWARD, (via[judge.key],))}
    assert found[after.key] == {Use(REWARD, (via[taught.key], via[judge.key]))}
    assert found[close.key] == {
        Use(REFERENCE, (via[judge.key],)),
        Use(REWARD, (via[after.key], via[taught.key], via[judge.key])),
    }
    assert found[watched.key] == {Use(WATCHED)}
