"""Checkpoints that are whole or absent.

One decision: a checkpoint counts when its marker is there and every file the marker lists has the size it says; the
marker is written last, by rename, after the files are on disk. A kill at any moment leaves the previous checkpoint
as the newest whole one. Only exact resume exists: without optimizer, schedule and random states there is no checkpoint.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Collection, Iterable, Set
from pathlib import Path

from tasks.digests import sync

MARKER = "whole.json"
FORMAT = 1  # layout of the marker


def required_files(ranks: Collection[int], processes: int, keeper: str | None = None) -> set[str]:
    """What an exact resume needs beside the weights, as patterns of names.

    Args:
        ranks: of this machine.
        processes: on all machines.
        keeper: who keeps the optimizer's state: None for Trainer, else `fsdp`, or `zero0` to `zero3` for DeepSpeed,
            which writes a folder of its own into the checkpoint.
    """
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    if keeper is None:
        states.append("optimizer.pt")
    elif keeper == "fsdp":
        states += ["optimizer.bin", "pytorch_model_fsdp.bin"]
    elif keeper == "zero0":
        states += ["latest", "global_step*/mp_rank_00_model_states.pt"]
    else:
        states += ["latest", *(f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks)]
    return {"scheduler.pt", "trainer_state.json", *states}


def missing_files(names: Iterable[str], required: Set[str]) -> list[str]:
    """The patterns of `required_files` that no name fits, sorted."""
    found = list(names)
    return sorted(pattern for pattern in required if not fnmatch.filter(found, pattern))


def step_of(folder: Path) -> int | None:
    """The step in `checkpoint-N`, or None for another name."""
    name, _, number = folder.name.rpartition("-")
    return int(number) if name == "checkpoint" and number.isdigit() else None


def mark_whole(folder: Path, required: Set[str]) -> None:
    """Write the marker of a finished checkpoint.

    Args:
        folder: the checkpoint.
        required: from `required_files`.

    Raises:
        FileNotFoundError: a file that an exact resume needs is missing.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(MARKER, None)
    missing = missing_files(files, required)
    if missing:
        raise FileNotFoundError(f"{folder.name} lacks {missing}")
    for path in files.values():
        sync(path)
    marker = {"format": FORMAT, "files": {name: path.stat().st_size for name, path in files.items()}}
    temporary = folder / f".{MARKER}"
    temporary.write_text(json.dumps(marker, indent=1), encoding="utf-8")
    sync(temporary)
    temporary.rename(folder / MARKER)
    sync(folder)
    sync(folder.parent)


def damage(folder: Path, required: Set[str]) -> str | None:
    """Why a checkpoint cannot be resumed from, or None."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return "its marker is missing or unreadable"
    if marker.get("format") != FORMAT:
        return f"its marker has format {marker.get('format')}, not {FORMAT}"
    missing = missing_files(marker["files"], required)
    if missing:
        return f"it lacks {missing}"
    for name, size in marker["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} does not have the {size} bytes it had"
    return None


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the folder's safetensors files, read from their headers."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def whole(root: Path, required: Set[str]) -> dict[int, Path]:
    """Step → its whole checkpoint, in the order of steps."""
    return {step: folder for step, folder in _checkpoints(root).items() if damage(folder, required) is None}


def remove_damaged(root: Path, required: Set[str]) -> list[str]:
    """Remove what cannot be resumed from; the reasons, one sentence each. For one process only, at the start."""
    reasons = []
    for folder in _checkpoints(root).values():
        reason = damage(folder, required)
        if reason:
            shutil.rmtree(folder)
            reasons.append(f"removed {folder.name}: {reason}")
    return reasons


def rotate(root: Path, keep: int, required: Set[str], best: int | None = None) -> None:
    """Remove all but the newest `keep` whole checkpoints, and that of step `best`; at least one always stays."""
    older = list(whole(root, required).items())[: -max(keep, 1)]
    for folder in (folder for step, folder in older if step != best):
        (folder / MARKER).unlink()  # first: a kill in the middle must not leave a marker on a thinned-out folder
        shutil.rmtree(folder)


def _checkpoints(root: Path) -> dict[int, Path]:
    if not root.is_dir():
        return {}
    found = [(step, folder) for folder in root.iterdir() if (step := step_of(folder)) is not None and folder.is_dir()]
    return dict(sorted(found))
