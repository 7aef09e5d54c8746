"""Write `requirements.lock` anew: install what pyproject.toml allows into an empty environment and note the versions.

One decision: plain pins that plain pip reads, without index hosts, hashes or local version suffixes, so that the same
file serves any index, and a CPU or a CUDA build of torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
OURS = re.compile(r"^(-e |llamatuner\b)")
HEAD = "# Made by `make lock` from pyproject.toml. Plain pip: pip install -r requirements.lock\n"


def main() -> None:
    """Resolve, and write the lock file."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", f"{PROJECT}[dev,deepspeed,postgres]"], check=True)
        frozen = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    # the local part (+cpu) names a build that only some indexes have
    pins = [re.sub(r"\+.*$", "", line) for line in frozen.splitlines() if not OURS.match(line)]
    (PROJECT / "requirements.lock").write_text(HEAD + "\n".join(sorted(pins, key=str.lower)) + "\n", encoding="utf-8")
    sys.stdout.write(f"requirements.lock: {len(pins)} packages\n")


if __name__ == "__main__":
    main()
