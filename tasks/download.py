"""download: the files of a remote data set.

One decision: the step is known by what was asked for (repository, subset, split, revision; or the URL), and once
downloaded it stays what it is, also when the hub's branch moves on, until its artifact is removed. Where the files
came from, with the commit, is reported beside them: equal files have equal digests wherever they came from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.data_files import is_data
from registry.data_sources import DataSource
from registry.errors import InputError, Problem
from tasks.launch import ProgramFailed, run_program
from tasks.steps import Step, Work

VERSION = 1  # first form
FILES = "files"
SOURCE = "report/source.json"


def download_step(stage: str, name: str, source: DataSource) -> Step:
    """The step that downloads a data set.

    Its artifact holds `files/`, the data files under their names in the repository, and `report/source.json`: where
    they came from, the commit, and each file with size and etag.

    Args:
        stage, name: where it stands in the plan.
        source: a remote one; which of its rows are taken is not this step's business.

    Raises:
        ValueError: its files are on this machine.
    """
    if source.remote is None:
        raise ValueError(f"{source.name} is on this machine: there is nothing to download")
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=source.name,
        identity=source.remote.identity(),
        inputs={},
        run="tasks.download:download",
        runtime={"where": f"data set {source.name}"},
    )


def downloaded_files(folder: Path) -> list[Path]:
    """The data files of a download artifact, in the order in which they are read."""
    return sorted(path for path in (folder / FILES).rglob("*") if path.is_file() and is_data(path.name))


def download(work: Work) -> dict[str, Any]:
    """Download in a program of its own, which can be stopped at any moment.

    Raises:
        InputError: the other side says no, or has nothing of what was asked for.
        ProgramFailed: of kind `network` when it cannot be reached; otherwise as `run_program`.
        Interrupted: the run was asked to stop.
    """
    try:
        run_program("tasks.download_program", work.spec(), work.folder, work.emit, work.stop)
    except ProgramFailed as failure:
        if failure.kind == "bad_setting":  # an InputError of the program's, whose text is whole
            raise InputError(Problem("", str(failure))) from failure
        raise
    found = json.loads((work.output / SOURCE).read_text(encoding="utf-8"))
    size = sum(file["size"] for file in found["files"])
    return {"files": len(found["files"]), "bytes": size, "commit": found.get("commit")}
