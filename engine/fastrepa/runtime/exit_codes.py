"""Exit codes of `fastrepa train`, and how a launch file learns of them behind torchrun's back.

torchrun ends with 1 whatever its processes ended with, and starts all of them again after any
error, one of the user's too. So where NOTE names a file, as configs/cluster/torchrun.sh sees to, a
process writes its code there, and what torchrun gets to see is an error only for a lost rank.
"""

from __future__ import annotations

import os
from pathlib import Path

REQUEUE = 75  # EX_TEMPFAIL: saved on a signal; the launch files start the run again
LOST = 76  # a rank was lost; the launch files start the run again
NOTE = "FASTREPA_EXIT_CODES"  # environment variable: a file, to which each process adds a line


def for_launcher(code: int) -> int:
    """Return what a process that means `code` exits with."""
    note = os.environ.get(NOTE)
    if not note:
        return code
    with Path(note).open("a") as f:
        f.write(f"{code}\n")
    return LOST if code == LOST else 0
