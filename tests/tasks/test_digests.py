"""A remembered digest is right as long as the file is the one it was computed from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tasks.digests import DigestMemory


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_byte_changed_at_equal_size_is_seen(tmp_path: Path) -> None:
    memory, file = DigestMemory(tmp_path / "digests.sqlite"), tmp_path / "data"
    file.write_text("abc")
    assert memory.sha256(file) == sha("abc")
    file.write_text("abd")
    assert memory.sha256(file) == sha("abd")


def test_a_quiet_file_is_remembered_and_a_touched_one_is_read_again(tmp_path: Path) -> None:
    memory, file = DigestMemory(tmp_path / "digests.sqlite"), tmp_path / "data"
    file.write_text("abc")
    os.utime(file, (1000, 1000))
    assert memory.sha256(file) == sha("abc")
    file.write_text("xyz")
    os.utime(file, (1000, 1000))  # what nobody does by accident: other bytes under the old stamp
    assert memory.sha256(file) == sha("abc")
    os.utime(file, (2000, 2000))
    assert memory.sha256(file) == sha("xyz")


def test_a_damaged_memory_is_made_anew(tmp_path: Path) -> None:
    memory, file = DigestMemory(tmp_path / "digests.sqlite"), tmp_path / "data"
    memory.path.write_bytes(b"not a database, but long enough to look like something" * 40)
    file.write_text("abc")
    assert memory.sha256(file) == sha("abc")
