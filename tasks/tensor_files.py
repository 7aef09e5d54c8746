"""safetensors files as bytes: what is in them, and copies of them in other files and another dtype.

One decision: no torch. Weights go through memory in pieces of 1 MB and are rounded once, to the nearest, ties to even,
as torch rounds. So the process that exports stays small, whatever the model's size.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.digests import sync

if TYPE_CHECKING:
    import numpy

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CODES = {name: code for code, name in FLOATS.items()}
# of a number; those that are not named have one or less
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
PIECE_BYTES = 1 << 20
METADATA = "__metadata__"


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file."""

    name: str
    file: Path
    dtype: str
    """The format's code: `F32`, `BF16`, …"""
    shape: tuple[int, ...]
    begin: int
    """Where its bytes begin in the file."""
    size: int
    """Bytes."""

    def written_dtype(self, dtype: str | None) -> str:
        """Its dtype in a copy whose floating-point numbers are `dtype`, e.g. `bfloat16`; None: as they are."""
        return CODES[dtype] if dtype and self.dtype in FLOATS else self.dtype

    def written_size(self, dtype: str | None) -> int:
        """Its bytes in such a copy."""
        after = self.written_dtype(dtype)
        return self.size if after == self.dtype else math.prod(self.shape) * BYTES[after]


def read_headers(folder: Path) -> Iterator[Tensor]:
    """Every tensor of a folder's safetensors files, file by file, as their headers name them.

    Raises:
        ValueError: a file that is none.
    """
    for path in sorted(folder.glob("*.safetensors")):
        yield from _read_header(path)


def read_tensors(folder: Path) -> list[Tensor]:
    """The same by name, each name once.

    Raises:
        ValueError: a file that is none, or a name that two files have.
    """
    found: dict[str, Tensor] = {}
    for tensor in read_headers(folder):
        if tensor.name in found:
            raise ValueError(f"{tensor.name} is in {found[tensor.name].file.name} and in {tensor.file.name}")
        found[tensor.name] = tensor
    return [found[name] for name in sorted(found)]


def _read_header(path: Path) -> Iterator[Tensor]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError(f"{path.name} is not a safetensors file: its header cannot have {length} bytes")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != METADATA:
            begin, end = entry["data_offsets"]
            yield Tensor(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)


def commonest_dtype(tensors: Iterable[Tensor]) -> str | None:
    """The format's code of the dtype that most numbers have; None without any."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else None


def share_out(
    tensors: Iterable[Tensor], stem: str, max_shard_size: int | None, dtype: str | None
) -> dict[str, list[Tensor]]:
    """File name → its tensors, in the order in which they are written: those of wide numbers first, then by name.

    Args:
        tensors: all of them, by name.
        stem: `model` makes `model.safetensors`, or `model-00001-of-00002.safetensors` and so on.
        max_shard_size: most bytes of tensors in one file; a larger tensor has a file of its own. None: one file.
        dtype: of the floating-point numbers in the files; None: as they are.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    known = {tensor.name: tensor for tensor in tensors}
    sizes = {name: tensor.written_size(dtype) for name, tensor in known.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=sum(sizes.values()) if max_shard_size is None else max_shard_size,
    )

    def place(tensor: Tensor) -> tuple[int, str]:
        return -BYTES.get(tensor.written_dtype(dtype), 1), tensor.name

    return {
        file: sorted((known[name] for name in names), key=place) for file, names in split.filename_to_tensors.items()
    }


def index_of(files: Mapping[str, list[Tensor]], dtype: str | None) -> dict[str, Any]:
    """`model.safetensors.index.json` of several files."""
    total = sum(tensor.written_size(dtype) for tensors in files.values() for tensor in tensors)
    where = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


def write_tensors(path: Path, tensors: Sequence[Tensor], dtype: str | None, told: Callable[[int], None]) -> None:
    """Write one safetensors file.

    Args:
        path: the file.
        tensors: where they come from, in order.
        dtype: of the floating-point numbers in it; None: as they are.
        told: gets the bytes written since it was last called.

    Raises:
        OverflowError: a number that `dtype` cannot hold, with the tensor's name.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"}}  # transformers refuses a file that does not say so
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.written_size(dtype)
        header[tensor.name] = {
            "dtype": tensor.written_dtype(dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in pieces(tensor, dtype):
                told(file.write(piece))
    sync(path)


def pieces(tensor: Tensor, dtype: str | None) -> Iterator[bytes]:
    """The bytes of a tensor, rounded once to `dtype`; None: as they are.

    Raises:
        OverflowError: a number that `dtype` cannot hold.
        ValueError: the file ends before the tensor does.
    """
    after, left = tensor.written_dtype(dtype), tensor.size
    with open(tensor.file, "rb") as file:
        file.seek(tensor.begin)
        while left:
            piece = file.read(min(left, PIECE_BYTES))
            if not piece:
                raise ValueError(f"{tensor.file.name} ends {left} bytes before the end of {tensor.name}")
            left -= len(piece)
            yield piece if after == tensor.dtype else _rounded(piece, tensor, after)


def _rounded(piece: bytes, tensor: Tensor, after: str) -> bytes:
    import numpy

    values = _float32(piece, tensor.dtype)
    with numpy.errstate(over="ignore"):  # found below, with the tensor's name
        rounded = _bfloat16(values) if after == "BF16" else values.astype("<f4" if after == "F32" else "<f2").tobytes()
    lost = numpy.isfinite(values) & ~numpy.isfinite(_float32(rounded, after))
    if lost.any():
        rule = f"{tensor.name} holds {float(values[lost][0]):.6g}, which {FLOATS[after]} cannot hold"
        raise OverflowError(rule)
    return rounded


def _float32(piece: bytes, dtype: str) -> numpy.ndarray:
    import numpy

    if dtype == "BF16":
        return (numpy.frombuffer(piece, "<u2").astype("<u4") << 16).view("<f4")
    return numpy.frombuffer(piece, "<f4" if dtype == "F32" else "<f2").astype("<f4")


def _bfloat16(values: numpy.ndarray) -> bytes:
    """The upper half of each number, rounded to nearest, ties to even; NaN stays NaN."""
    import numpy

    bits = values.view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return numpy.where(numpy.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes()


def difference(path: Path, tensors: Sequence[Tensor], dtype: str | None, told: Callable[[int], None]) -> str | None:
    """What differs between a file that was written and what it was made of, read by the safetensors library; or None.

    Args:
        path, tensors, dtype: as `write_tensors` was told.
        told: gets the bytes compared since it was last called.
    """
    from safetensors import safe_open

    wanted = {t.name: (t.written_dtype(dtype), t.shape) for t in tensors}
    with safe_open(path, framework="np") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    if found != wanted:
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        return f"{names[0]} and {len(names) - 1} more tensors are missing, or of another dtype or shape"
    written = {tensor.name: tensor for tensor in _read_header(path)}
    for tensor in tensors:
        if not tensor.size:
            return f"{tensor.name} is empty"
        with open(path, "rb") as file:
            file.seek(written[tensor.name].begin)
            for piece in pieces(tensor, dtype):
                if file.read(len(piece)) != piece:
                    return f"{tensor.name} has other numbers than its source"
                told(len(piece))
    return None
