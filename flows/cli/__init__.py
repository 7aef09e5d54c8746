"""The command line: `llamatuner`, also as `llamatuner-cli`.

One decision: a command imports what it needs when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line and exit with 0, 1, 2 or 130."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        from flows.cli.app import run_app

        code = run_app()
    except KeyboardInterrupt:  # while the command line itself was loaded
        code = 130
    if "flows.runner" in sys.modules:
        sys.modules["flows.runner"].leave(code)
    sys.exit(code)


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like Ctrl-C, wherever nobody has taken it over."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
