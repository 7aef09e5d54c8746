"""What ran: versions of packages, the project's commit, the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent


@cache
def package_version(name: str) -> str:
    """The installed version of a package, or `absent`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Package → installed version."""
    return {name: package_version(name) for name in names}


@cache
def git_commit() -> str | None:
    """The project's commit, with `+` when files differ from it; None outside a git checkout."""
    if not (PROJECT / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=PROJECT, capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def provenance() -> dict[str, Any]:
    """Commit, command line, Python version: recorded with every artifact, never part of a key."""
    return {"git_commit": git_commit(), "argv": sys.argv, "python": sys.version.split()[0]}
