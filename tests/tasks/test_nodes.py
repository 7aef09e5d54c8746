"""What the environment says about the machines that train together."""

from __future__ import annotations

import pytest

from registry.errors import InputError
from registry.records import TrainSettings
from tasks.devices import Device, visible
from tasks.nodes import Nodes, nodes_of_environment, torchrun_is_forced
from tasks.training import nodes_for

TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
CARDS = tuple(Device(f"GPU-{name}", "L4", (8, 9), 23034) for name in ("aa", "ab", "b"))


def test_one_machine_takes_a_free_port_for_each_run() -> None:
    assert nodes_of_environment({}) == Nodes()
    # a scheduler sets these for every job: with one machine nobody has to be met at a fixed port
    assert nodes_of_environment({"NNODES": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}) == Nodes()
    assert "--rdzv-endpoint=127.0.0.1:0" in nodes_of_environment({}).torchrun(4)


def test_several_machines_meet_where_the_environment_says() -> None:
    assert nodes_of_environment(TWO | {"MASTER_PORT": "29666"}).torchrun(4) == [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--node-rank=1",
        "--master-addr=10.0.0.1",
        "--master-port=29666",
    ]
    elastic = nodes_of_environment(TWO | {"RDZV_ID": "job-7", "MAX_RESTARTS": "3"})
    assert elastic.torchrun(4) == [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.0.0.1:29500",
        "--rdzv-id=job-7",
    ]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NNODES": "two"}, "NNODES: 'two' is not a whole number"),
        ({"NNODES": "0"}, "NNODES: '0' is not a whole number"),
        (TWO | {"NODE_RANK": "2"}, "NODE_RANK: '2' is not a whole number from 0 to 1"),
        (TWO | {"NODE_RANK": ""}, "NODE_RANK: NNODES is 2 and nothing says which one this is"),
        (TWO | {"MASTER_ADDR": ""}, "MASTER_ADDR: NNODES is 2 and nothing says where they meet"),
        (TWO | {"MASTER_PORT": "99999"}, "MASTER_PORT: '99999' is not a whole number from 1 to 65535"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: '-1' is not a whole number"),
    ],
)
def test_an_environment_that_cannot_be_right_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as error:
        nodes_of_environment(environment)
    assert said in str(error.value)


@pytest.mark.parametrize(("value", "forced"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_torchrun_can_be_forced(value: str, forced: bool) -> None:
    assert torchrun_is_forced({"FORCE_TORCHRUN": value}) is forced


def test_one_plain_process_is_started_without_torchrun_and_anything_else_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NNODES", "FORCE_TORCHRUN", "MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    one = TrainSettings().identity()
    assert nodes_for(one, forced=False) is None
    assert nodes_for(one, forced=True) == Nodes()
    for settings in ({"nproc_per_node": 2}, {"deepspeed": "zero2"}, {"fsdp": True}):
        assert nodes_for(TrainSettings(**settings).identity(), forced=False) == Nodes()
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    assert nodes_for(one, forced=False) == Nodes()


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        (None, ["GPU-aa", "GPU-ab", "GPU-b"]),
        ("2,0", ["GPU-b", "GPU-aa"]),
        ("0,9,1", ["GPU-aa"]),  # CUDA sees nothing behind a device that there is not
        ("-1", []),
        ("", []),
        ("GPU-b,GPU-ab", ["GPU-b", "GPU-ab"]),
        ("MIG-77,MIG-78", ["GPU-aa", "GPU-aa"]),
    ],
)
def test_only_visible_devices_count(wanted: str | None, seen: list[str]) -> None:
    assert [device.uuid for device in visible(CARDS, wanted)] == seen
