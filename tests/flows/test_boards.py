"""TensorBoard and Weights & Biases get the curve of a training, and a run does not depend on them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.boards import wandb_may_send
from flows.cli.app import run_app
from registry.old_configs import translate
from tasks.jsonlines import read_json_lines
from tests.flows.conftest import Server
from tests.flows.toy import run, start, toy_recipe

Capture = pytest.CaptureFixture[str]


def curve(folder: Path) -> dict[int, float]:
    """Step → loss in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {each.step: each.tensor_proto.float_val[0] for each in events.Tensors("loss")}


def logged(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's form: blocks of 32 KiB; checksum, length and kind before each part."""
    place, whole = 7, b""  # behind the file's own header
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<HB", log, place + 4)
        whole += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


def history(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and points in a file of W&B's."""
    from wandb.proto.wandb_internal_pb2 import Record

    config, points = dict[str, Any](), list[dict[str, Any]]()
    for data in logged(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
        if record.WhichOneof("record_type") == "history":
            points.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return config, points


@pytest.mark.slow
def test_the_curve_is_on_both_and_a_board_that_fails_is_left_alone(tmp_path: Path, home: Path, server: Server) -> None:
    recipe = toy_recipe(tmp_path / "recipe", report_to="tensorboard,wandb", wandb_project="mine", learning_rate=0.011)
    environment = {"WANDB_MODE": "offline", "PREFECT_API_URL": server.url}
    command = start("run", str(recipe), "--json", **environment)
    out, err = command.communicate(timeout=300)
    assert command.returncode == 0, err
    answer = json.loads(out)
    assert "the curve is in TensorBoard: tensorboard --logdir" in " ".join(err.split())
    (trained,) = (Path(step["artifact"]) for step in answer["steps"] if step["step"] == "train")
    expected = {line["step"]: line["loss"] for line in read_json_lines(trained / "report" / "metrics.jsonl")}
    assert len(expected) == 4
    (folder,) = home.glob("tensorboard/toy/*/sft")
    assert curve(folder) == pytest.approx(expected)
    (file,) = home.glob("wandb/wandb/offline-run-*/*.wandb")
    config, points = history(file)
    assert config["learning_rate"] == 0.011
    assert {point["_step"]: point["loss"] for point in points} == pytest.approx(expected)
    assert run("run", str(recipe), **environment)["status"] == "up-to-date"  # nor is anything drawn again

    for path in sorted((home / "wandb").rglob("*"), reverse=True):
        path.unlink() if path.is_file() or path.is_symlink() else path.rmdir()
    (home / "wandb").rmdir()
    (home / "wandb").write_text("in the way")
    command = start("run", str(recipe), "--json", "--set", "stages.sft.seed=7", **environment)
    out, err = command.communicate(timeout=300)
    assert json.loads(out)["status"] == "completed"
    assert err.count("wandb is told nothing more: FileExistsError") == 1
    assert len(list(home.glob("tensorboard/toy/*/sft"))) == 2


def test_a_board_that_there_is_not_or_nobody_can_reach_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    recipe = toy_recipe(tmp_path / "recipe", report_to=["wandb"])
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert run_app(["run", str(recipe)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "stages.sft.report_to: nobody is logged in to Weights & Biases." in said
    assert "Set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline." in said
    assert run_app(["check", str(recipe), "--set", "stages.sft.report_to=neptune"]) == 2
    assert "stages.sft.report_to" in capsys.readouterr().err
    monkeypatch.setattr("flows.preflight.find_spec", lambda name: None)
    assert run_app(["run", str(recipe)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "stages.sft.report_to: the package wandb is not installed. pip install wandb" in said


def test_who_is_logged_in_is_read_where_wandb_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_may_send()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password abc\n")
    assert wandb_may_send()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert not wandb_may_send()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_may_send()
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("none", None),
        ("mlflow", None),
        (None, None),
        (["mlflow", "wandb"], ["wandb"]),
        ("all", None),
        ("wandb", "wandb"),
    ],
)
def test_what_old_configs_report_to_is_read_as_the_boards_among_it(written: Any, read: Any) -> None:
    found = translate({"report_to": written}, str)
    assert found.problems == []
    assert found.settings.get("report_to") == read
