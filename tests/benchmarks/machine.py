"""What a timing was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """Python, cores, processor and load, in one line."""
    facts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in facts if line.startswith("model name")), "?")
    python, load = platform.python_version(), os.getloadavg()[0]
    return f"Python {python} on {os.cpu_count()} cores of {cpu}, load {load:.1f} at the end"
