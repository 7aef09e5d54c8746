"""Checkpoints that are whole or absent.

One decision: a checkpoint counts when its marker is there and every file the marker lists has the size it says; the
marker is written last, by rename, after the files are on disk. A kill at any moment leaves the previous checkpoint
as the newest whole one. Only exact resume exists: without optimizer, schedule and random states there is no checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tasks.digests import sync

MARKER = "whole.json"
FORMAT = 1  # layout of the marker


def required_files(processes: int) -> set[str]:
    """What an exact resume needs beside the weights."""
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    return {"optimizer.pt", "scheduler.pt", "trainer_state.json", *states}


def step_of(folder: Path) -> int | None:
    """The step in `checkpoint-N`, or None for another name."""
    name, _, number = folder.name.rpartition("-")
    return int(number) if name == "checkpoint" and number.isdigit() else None


def mark_whole(folder: Path, processes: int) -> None:
    """Write the marker of a finished checkpoint.

    Raises:
        FileNotFoundError: a file that an exact resume needs is missing.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(MARKER, None)
    missing = required_files(processes) - set(files)
    if missing:
        raise FileNotFoundError(f"{folder.name} lacks {sorted(missing)}")
    for path in files.values():
        sync(path)
    marker = {"format": FORMAT, "files": {name: path.stat().st_size for name, path in files.items()}}
    temporary = folder / f".{MARKER}"
    temporary.write_text(json.dumps(marker, indent=1), encoding="utf-8")
    sync(temporary)
    temporary.rename(folder / MARKER)
    sync(folder)
    sync(folder.parent)


def damage(folder: Path, processes: int) -> str | None:
    """Why a checkpoint cannot be resumed from, or None."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return "its marker is missing or unreadable"
    if marker.get("format") != FORMAT:
        return f"its marker has format {marker.get('format')}, not {FORMAT}"
    missing = required_files(processes) - set(marker["files"])
    if missing:
        return f"it lacks {sorted(missing)}"
    for name, size in marker["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} does not have the {size} bytes it had"
    return None


def newest_whole(root: Path, processes: int) -> Path | None:
    """The whole checkpoint of the highest step."""
    whole = [folder for folder in _checkpoints(root) if damage(folder, processes) is None]
    return whole[-1] if whole else None


def remove_damaged(root: Path, processes: int) -> list[str]:
    """Remove what cannot be resumed from; the reasons, one sentence each. For one process only, at the start."""
    reasons = []
    for folder in _checkpoints(root):
        reason = damage(folder, processes)
        if reason:
            shutil.rmtree(folder)
            reasons.append(f"removed {folder.name}: {reason}")
    return reasons


def rotate(root: Path, keep: int, processes: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` whole checkpoints, and that of step `best`; at least one always stays."""
    whole = [folder for folder in _checkpoints(root) if damage(folder, processes) is None]
    for folder in (folder for folder in whole[: -max(keep, 1)] if step_of(folder) != best):
        (folder / MARKER).unlink()  # first: a kill in the middle must not leave a marker on a thinned-out folder
        shutil.rmtree(folder)


def _checkpoints(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [(step, folder) for folder in root.iterdir() if (step := step_of(folder)) is not None and folder.is_dir()]
    return [folder for _, folder in sorted(found)]
