"""Devices are shared out once, in turn, by memory where it is known, and come free however their holder ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.devices import Device, cuda_devices
from tasks.launch import PROJECT
from tasks.locks import Interrupted
from tasks.slots import MARGIN, MARGIN_MIB, MIB, PROCESSORS, Wanted, choose, devices_for, pool, seen_devices
from tests.flows.toy import start, toy_recipe

GIB = 2.0**30
ONE, TWO, THREE = (Device(f"GPU-{letter}", "NVIDIA L4", (8, 9), 24000) for letter in "abc")
NAMES = {"GPU-a", "GPU-b", "GPU-c"}
HOLD = """
import sys, time
from pathlib import Path
from tasks.slots import Wanted, devices_for
with devices_for(Path(sys.argv[1]), Wanted("other/train", int(sys.argv[2])), None, print) as taken:
    print(*taken, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with three devices; the folder of the claims."""
    tool = tmp_path / "bin" / "nvidia-smi"  # stands for the driver's tool, not for code of ours
    tool.parent.mkdir()
    lines = [f"GPU-{letter}, NVIDIA L4, 8.9, 24000" for letter in "abc"]
    tool.write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda_devices.cache_clear()
    yield tmp_path / "claims"
    cuda_devices.cache_clear()


class Holder(threading.Thread):
    """Asks for devices, and holds them until it is told to let go."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        super().__init__(daemon=True)
        self.folder, self.wanted = folder, wanted
        self.taken: tuple[str, ...] = ()
        self.said: list[str] = []
        self.has, self.done, self.stop = threading.Event(), threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        """Hold."""
        try:
            with devices_for(self.folder, self.wanted, self.stop, self.said.append) as self.taken:
                self.has.set()
                self.done.wait(60)
        except Interrupted:
            self.said.append("stopped")

    def waits(self) -> bool:
        """It has told whom it waits for."""
        deadline = time.monotonic() + 10
        while not self.said and not self.has.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(self.said) and not self.has.is_set()

    def let_go(self) -> None:
        """End it."""
        self.done.set()
        self.join(10)


def test_without_cuda_a_step_takes_the_processors_whole(tmp_path: Path) -> None:
    assert pool() == (PROCESSORS,)
    first = Holder(tmp_path, Wanted("sft/train", 2))
    assert first.has.wait(10)
    assert first.taken == ("cpu",)
    assert seen_devices(first.taken) == {}
    second = Holder(tmp_path, Wanted("base/evaluate"))
    assert second.waits()
    assert second.said == [f"waiting for the processors: sft/train of process {os.getpid()}"]
    first.let_go()
    assert second.has.wait(10)
    second.let_go()
    assert not list(tmp_path.glob("*.claim"))


def test_steps_compute_side_by_side_on_devices_of_their_own(three: Path) -> None:
    holders = [Holder(three, Wanted(f"{number}/train")) for number in range(4)]
    assert sum(holder.has.wait(3) for holder in holders) == 3
    (late,) = [holder for holder in holders if not holder.has.is_set()]
    early = [holder for holder in holders if holder is not late]
    assert {holder.taken for holder in early} == {(name,) for name in NAMES}
    assert seen_devices(early[0].taken) == {"CUDA_VISIBLE_DEVICES": early[0].taken[0]}
    assert seen_devices(("GPU-a", "GPU-b", "GPU-c")) == {}  # nothing to say
    early[1].let_go()
    assert late.has.wait(10)
    assert late.taken == early[1].taken
    for holder in holders:
        holder.let_go()


def test_who_needs_all_devices_is_not_passed_by_those_who_need_one(three: Path) -> None:
    first = Holder(three, Wanted("a/train"))
    assert first.has.wait(10)
    whole = Holder(three, Wanted("b/train", 8))
    assert whole.waits()
    late = Holder(three, Wanted("c/evaluate"))
    assert late.waits()
    assert late.said == [f"waiting for a device: a/train of process {os.getpid()}; 1 wait too"]
    first.let_go()
    assert whole.has.wait(10)
    assert set(whole.taken) == NAMES
    assert not late.has.is_set()
    whole.let_go()
    assert late.has.wait(10)
    late.let_go()


def test_a_device_is_shared_by_those_whose_memory_is_known_and_fits() -> None:
    devices, needed = [ONE, TWO], Wanted("sft/train", memory=10 * GIB)
    counted = 10 * 1024 * MARGIN + MARGIN_MIB
    assert choose(devices, {}, needed) == ("GPU-a",)
    assert choose(devices, {"GPU-a": [counted]}, needed) == ("GPU-b",)  # a free one rather than a shared one
    assert choose(devices, {"GPU-a": [24000 - counted], "GPU-b": [None]}, needed) == ("GPU-a",)
    assert choose(devices, {"GPU-a": [24001 - counted], "GPU-b": [None]}, needed) is None
    assert choose(devices, {"GPU-a": [1.0], "GPU-b": [None]}, Wanted("base/evaluate")) is None  # it may take all
    assert choose(devices, {"GPU-a": [1.0]}, Wanted("sft/train", 2, 10 * GIB)) == ("GPU-a", "GPU-b")
    too_much = Wanted("sft/train", memory=40 * GIB)  # the estimate may be wrong: it is tried, alone
    assert choose(devices, {"GPU-a": [1.0]}, too_much) == ("GPU-b",)
    assert MIB * 1024 == GIB


def test_the_devices_of_a_holder_that_is_killed_are_free_again(three: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(three), "3"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert other.stdout
    assert set(other.stdout.readline().split()) == NAMES
    mine = Holder(three, Wanted("sft/train"))
    assert mine.waits()
    assert mine.said == [f"waiting for a device: other/train of process {other.pid}"]
    other.kill()
    other.wait(10)
    assert mine.has.wait(10)
    (claim,) = three.glob("*.claim")
    assert json.loads(claim.read_text())["devices"] == list(mine.taken)
    mine.let_go()


def test_a_wait_ends_when_the_run_is_stopped_and_keeps_no_place(three: Path) -> None:
    first, second = Holder(three, Wanted("a/train", 3)), Holder(three, Wanted("b/train", 3))
    holding, waiting = (first, second) if first.has.wait(2) else (second, first)
    assert waiting.waits()
    waiting.stop.set()
    waiting.join(10)
    assert waiting.said[-1] == "stopped"
    assert len(list(three.glob("*.claim"))) == 1
    holding.let_go()


def test_slices_of_a_device_are_given_out_as_one(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    cuda_devices.cache_clear()
    assert [device.uuid for device in pool()] == ["GPU-a"]
    assert seen_devices(("GPU-a",)) == {}
    with devices_for(three, Wanted("sft/train", 2), None, print) as taken:
        assert taken == ("GPU-a",)


def said(folder: Path) -> list[dict[str, Any]]:
    """What the claims say that are there."""
    found = []
    for claim in folder.glob("*.claim"):
        with contextlib.suppress(FileNotFoundError):  # its holder is done
            found.append(json.loads(claim.read_text() or "{}"))
    return found


@pytest.mark.slow
def test_two_trainings_of_a_run_use_a_device_each_at_the_same_time(three: Path, home: Path, tmp_path: Path) -> None:
    toy = toy_recipe(tmp_path / "recipe", steps=40, nproc_per_node=1, bf16=False)
    raw = json.loads(toy.read_text()) | {"evaluation": {"compare_with": "none"}}
    raw["stages"] = {name: raw["stages"]["sft"] | {"seed": seed} for seed, name in enumerate(("first", "second"))}
    toy.write_text(json.dumps(raw))
    command = start("run", str(toy), "--json")
    together: set[tuple[str, ...]] = set()
    while command.poll() is None:
        held = said(home / "locks" / "devices")
        training = [claim["devices"] for claim in held if claim.get("title", "").endswith("/train")]
        together.add(tuple(sorted(name for devices in training for name in devices)))
        time.sleep(0.05)
    out, err = command.communicate()
    assert command.returncode == 0, err
    assert ("GPU-a", "GPU-b") in together
    assert json.loads(out)["status"] == "completed"
    assert not list((home / "locks" / "devices").glob("*.claim"))
