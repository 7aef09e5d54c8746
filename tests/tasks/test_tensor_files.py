"""safetensors files as bytes: rounding is torch's, files are the format's, and nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tasks.tensor_files
from tasks.tensor_files import (
    commonest_dtype,
    difference,
    index_of,
    pieces,
    read_tensors,
    share_out,
    write_tensors,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def silent(size: int) -> None:
    """Progress nobody looks at."""


def every_number(dtype: str) -> torch.Tensor:
    """Every number of 16 bits that float16 can hold; of float32 those that are hard to round, and many more."""
    if dtype == "float32":
        halves = torch.arange(0, 1 << 16, dtype=torch.int32) << 16
        lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001], dtype=torch.int32)
        values = (halves[:, None] + lower).flatten().view(torch.float32)
    else:
        values = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    return values[values.abs().float() < 65504]


@pytest.mark.parametrize("before", DTYPES)
@pytest.mark.parametrize("after", DTYPES)
def test_numbers_are_rounded_as_torch_rounds_them(
    tmp_path: Path, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.tensor_files, "PIECE_BYTES", 4096)
    values = every_number(before)
    assert len(values) > 30000
    save_file({"a": values}, tmp_path / "x.safetensors")
    (tensor,) = read_tensors(tmp_path)
    write_tensors(tmp_path / "y", [tensor], after, silent)
    found = load_file(tmp_path / "y")["a"]
    assert found.dtype == DTYPES[after]
    kind = torch.int32 if after == "float32" else torch.int16
    assert torch.equal(found.view(kind), values.to(DTYPES[after]).view(kind))
    assert max(len(piece) for piece in pieces(tensor, after)) <= 8192


def test_nan_and_infinity_stay_what_they_are(tmp_path: Path) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    values = torch.cat([values, torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    save_file({"a": values}, tmp_path / "x.safetensors")
    for after, dtype in DTYPES.items():
        write_tensors(tmp_path / "y", read_tensors(tmp_path), after, silent)
        assert torch.equal(load_file(tmp_path / "y")["a"].nan_to_num(7.0), values.to(dtype).nan_to_num(7.0))


@pytest.mark.parametrize(("value", "after"), [(65520.0, "float16"), (3.4e38, "bfloat16")])
def test_a_number_too_large_is_refused_with_its_tensor(tmp_path: Path, value: float, after: str) -> None:
    save_file({"small": torch.ones(3), "large": torch.tensor([1.0, -value])}, tmp_path / "x.safetensors")
    with pytest.raises(
        OverflowError, match=rf"^large holds -{value:.6g}".replace("+", r"\+") + f", which {after} cannot"
    ):
        write_tensors(tmp_path / "y", read_tensors(tmp_path), after, silent)


def mixed(folder: Path) -> dict[str, torch.Tensor]:
    state = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.arange(5, dtype=torch.float32),
        "flags": torch.tensor([True, False, True]),
        "steps": torch.tensor(7),
    }
    save_file({name: state[name] for name in ("b", "flags")}, folder / "model-00001-of-00002.safetensors")
    save_file({name: state[name] for name in ("a", "steps")}, folder / "model-00002-of-00002.safetensors")
    return state


def test_what_is_no_float_stays_as_it_is(tmp_path: Path) -> None:
    state = mixed(tmp_path)
    tensors = read_tensors(tmp_path)
    assert [tensor.name for tensor in tensors] == ["a", "b", "flags", "steps"]
    assert commonest_dtype(tensors) == "BF16"
    (kept,) = share_out(tensors, "model", None, "float16").values()
    assert [tensor.name for tensor in kept] == ["steps", "a", "b", "flags"]  # wide numbers first: all lie aligned
    write_tensors(tmp_path / "y", kept, "float16", silent)
    found = load_file(tmp_path / "y")
    assert {name: value.dtype for name, value in found.items()} == {
        "a": torch.float16,
        "b": torch.float16,
        "flags": torch.bool,
        "steps": torch.int64,
    }
    assert all(torch.equal(found[name].float(), state[name].float()) for name in state)
    assert difference(tmp_path / "y", kept, "float16", silent) is None


def test_files_are_as_large_as_is_asked_for_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 20, "c": 100, "d": 5}
    save_file({name: torch.ones(size) for name, size in sizes.items()}, tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path)
    files = share_out(tensors, "model", 120, None)
    assert {file: [tensor.name for tensor in kept] for file, kept in files.items()} == {
        "model-00001-of-00003.safetensors": ["c"],  # larger than a file may be: alone
        "model-00002-of-00003.safetensors": ["a", "b"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    halved = share_out(tensors, "model", None, "bfloat16")
    assert list(halved) == ["model.safetensors"]
    index = index_of(files, None)
    assert index["metadata"] == {"total_size": 540}
    assert list(index["weight_map"]) == ["a", "b", "c", "d"]


def test_what_the_disk_did_not_keep_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path)
    write_tensors(tmp_path / "y", tensors, None, silent)
    assert difference(tmp_path / "y", tensors, None, silent) is None
    data = bytearray((tmp_path / "y").read_bytes())
    data[-1] ^= 1
    (tmp_path / "y").write_bytes(data)
    assert difference(tmp_path / "y", tensors, None, silent) == "b has other numbers than its source"
    write_tensors(tmp_path / "y", tensors[:1], None, silent)
    assert str(difference(tmp_path / "y", tensors, None, silent)).startswith("b and 0 more tensors are missing")
    save_file({"a": torch.arange(4.0), "e": torch.ones(0)}, tmp_path / "x.safetensors")
    write_tensors(tmp_path / "y", read_tensors(tmp_path), None, silent)
    assert difference(tmp_path / "y", read_tensors(tmp_path), None, silent) == "e is empty"


def test_the_library_reads_names_that_are_not_ascii_and_what_they_were_saved_for(tmp_path: Path) -> None:
    save_file({"größe": torch.ones(3)}, tmp_path / "x.safetensors")
    write_tensors(tmp_path / "y", read_tensors(tmp_path), None, silent)
    assert list(load_file(tmp_path / "y")) == ["größe"]
    data = (tmp_path / "y").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_files_that_are_none_and_names_that_two_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_tensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"a is in x\.safetensors and in y\.safetensors"):
        read_tensors(tmp_path)
