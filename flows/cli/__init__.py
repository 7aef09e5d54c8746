"""The command line: `llamatuner`, also as `llamatuner-cli`.

One decision: a command imports what it needs when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with 0, 1, 2 or 130."""
    from flows.cli.app import run_app

    sys.exit(run_app())


if __name__ == "__main__":
    main()
