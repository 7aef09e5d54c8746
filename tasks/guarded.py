"""Somebody else's program, started so that it ends with the task that started it: `python -m tasks.guarded COMMAND…`.

One decision: what the kernel was asked for is kept when this process becomes the program.
"""

from __future__ import annotations

import os
import sys

from tasks.program import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
