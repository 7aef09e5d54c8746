"""torchrun that ends with the task that started it, and says which of its ranks was killed.

One decision: torchrun is run inside this module instead of as its own command, because the agent must ask the
kernel to be ended with its parent before it starts ranks; torchrun itself never asks, and is then left behind.

A rank that is killed cannot say so, and the others only say that they lost it. The agent knows the signal; so what it
knows replaces what they wrote, unless that is a cause of its own.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from tasks.program import Spec, die_with_parent, ended_by


def main() -> None:
    """Run torchrun with this process's arguments, the last of them a spec. SIGTERM lets the agent close its ranks."""
    die_with_parent(signal.SIGTERM)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        message = killed_ranks({rank: failure.exitcode for rank, failure in error.failures.items()})
        file = Path(Spec.read(sys.argv[-1]).failure)
        if message and (not file.exists() or json.loads(file.read_text(encoding="utf-8"))["kind"] == "unexpected"):
            file.write_text(json.dumps({"kind": "killed", "message": message}), encoding="utf-8")
        raise


def killed_ranks(codes: Mapping[int, int]) -> str:
    """Which ranks were ended by a signal, as a sentence; empty when none was.

    Args:
        codes: rank → exit code. The agent ends the ranks that are left by SIGTERM, so that is a cause only where all
            ranks ended by it.

    >>> killed_ranks({0: 1, 1: -9, 2: -15})
    'rank 1 was ended by signal 9 (for want of memory, or by hand)'
    """
    own = [-code for code in codes.values()] == [signal.SIGTERM] * len(codes)
    killed = {rank: -code for rank, code in sorted(codes.items()) if code < 0 and (own or -code != signal.SIGTERM)}
    return "; ".join(f"rank {rank} {ended_by(number)}" for rank, number in killed.items())


if __name__ == "__main__":
    main()
