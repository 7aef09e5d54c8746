"""Where everything of ours lives: one folder, `LLAMATUNER_HOME`.

One decision: nothing below the home is referred to by absolute path, so the whole folder can be moved.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from registry.errors import InputError, Problem


@dataclass(frozen=True)
class Home:
    """The folders of a home. Made with `Home.open`, which also proves that it can be written."""

    path: Path

    @classmethod
    def default(cls) -> Home:
        """`$LLAMATUNER_HOME`, or `~/.llamatuner`; nothing is made or checked."""
        return cls(Path(os.environ.get("LLAMATUNER_HOME") or Path.home() / ".llamatuner").expanduser().absolute())

    @classmethod
    def open(cls) -> Home:
        """The default home, made if it is not there.

        Raises:
            InputError: it cannot be made or written.
        """
        home = cls.default()
        try:
            home.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=home.path) as probe:
                probe.write(b"x")
        except OSError as error:
            raise InputError(
                Problem(
                    str(home.path),
                    f"the home cannot be written: {error.strerror}",
                    "Set LLAMATUNER_HOME to a folder you own.",
                )
            ) from error
        return home

    def require_free(self, needed: int) -> None:
        """Refuse to start what will not fit.

        Args:
            needed: bytes that will be written under the home.

        Raises:
            InputError: the disk has less than `needed` bytes free.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise InputError(
                Problem(
                    str(self.path),
                    f"{free / 1e6:,.0f} MB free on the disk, about {needed / 1e6:,.0f} MB needed",
                    "Free space, run `llamatuner artifacts gc`, or set LLAMATUNER_HOME to another disk.",
                )
            )

    @property
    def artifacts(self) -> Path:
        """Finished artifacts, `<step>/<name>-<key12>/`."""
        return self.path / "artifacts"

    @property
    def chunks(self) -> Path:
        """Finished chunks of data steps, by step and key; artifacts link to them."""
        return self.path / "chunks"

    @property
    def work(self) -> Path:
        """Unfinished steps, `<step>-<key12>/`; they survive a crash."""
        return self.path / "work"

    @property
    def delivered(self) -> Path:
        """One empty file per artifact that a shared store has from here, or had when it was asked."""
        return self.path / "delivered"

    @property
    def damaged(self) -> Path:
        """Artifacts found damaged, kept for a look."""
        return self.path / "damaged"

    @property
    def locks(self) -> Path:
        """Lock files, one per key and one per compute slot."""
        return self.path / "locks"

    @property
    def runs(self) -> Path:
        """One JSON file per pipeline run."""
        return self.path / "runs"

    @property
    def sweeps(self) -> Path:
        """Sweeps, a folder each: Optuna's database of its trials, pictures, the best recipe."""
        return self.path / "sweeps"

    @property
    def digests(self) -> Path:
        """Remembered digests of files."""
        return self.path / "digests.sqlite"

    @property
    def mlflow(self) -> Path:
        """MLflow's database and artifacts, when no tracking server is set."""
        return self.path / "mlflow"

    @property
    def prefect(self) -> Path:
        """Prefect's database and logs, when no server is set."""
        return self.path / "prefect"

    @property
    def servers(self) -> Path:
        """Which servers `llamatuner up` started, as JSON."""
        return self.path / "servers.json"

    @property
    def logs(self) -> Path:
        """What those servers print, a file each."""
        return self.path / "logs"
