"""torchrun that ends with the task that started it.

One decision: torchrun is run inside this module instead of as its own command, because the agent must ask the
kernel to be ended with its parent before it starts ranks; torchrun itself never asks, and is then left behind.
"""

from __future__ import annotations

import signal
import sys

from tasks.program import die_with_parent


def main() -> None:
    """Run torchrun with this process's arguments. SIGTERM lets the agent close its ranks."""
    die_with_parent(signal.SIGTERM)
    from torch.distributed.run import main as torchrun

    torchrun(sys.argv[1:])


if __name__ == "__main__":
    main()
