"""A server with the interface of S3 on loopback, over a folder in which tests can look at, and spoil, what it keeps."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

KEY, SECRET, BUCKET = "tuner-test", "secret-of-the-tests", "bucket"
START_SECONDS = 60.0


class S3Server:
    """`rclone serve s3` over a folder; each folder in it is a bucket.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / BUCKET).mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> str:
        """What LLAMATUNER_STORE is set to."""
        return f"s3://{BUCKET}/team/store"

    @property
    def environment(self) -> dict[str, str]:
        """What the clients of S3 read."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }

    def start(self) -> None:
        """Start it, or start it again on the same port and folder."""
        program = Path(sys.executable).with_name("rclone")
        found = str(program) if program.exists() else shutil.which("rclone")
        if found is None:
            pytest.skip("rclone is not installed; it comes with the extra dev")
        arguments = ["serve", "s3", str(self.root), "--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}"]
        # what is changed under its root by hand is soon seen; with 0 it is busy all the time
        command = [found, *arguments, "--dir-cache-time", "200ms", "--config", str(self.root.parent / "rclone.conf")]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.05)

    def stop(self) -> None:
        """End it; what it keeps stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def kept(self) -> dict[str, Path]:
        """Key → file of every object, without the folder of the store."""
        folder = self.root / BUCKET / "team" / "store"
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
