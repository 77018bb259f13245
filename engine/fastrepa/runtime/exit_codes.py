"""Exit codes of `fastrepa train`, and how a launch file learns of them behind torchrun's back.

torchrun ends with 1 whatever its processes ended with, and starts all of them again after any
error, one of the user's too. So where NOTE names a file, as configs/cluster/torchrun.sh sees to, a
process writes its code there, and what torchrun gets to see is an error only for a lost rank.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fastrepa.errors import print_warning, worded

REQUEUE = 75  # EX_TEMPFAIL: saved on a signal; the launch files start the run again
LOST = 76  # a rank was lost; the launch files start the run again
NOTE = "FASTREPA_EXIT_CODES"  # environment variable: a file, to which each process adds a line


def for_launcher(code: int) -> int:
    """Return what a process that means `code` exits with: `code` itself where nobody asks for a
    note, or where it cannot be written.
    """
    note = os.environ.get(NOTE)
    if not note:
        return code
    try:
        with Path(note).open("a") as f:
            f.write(f"{code}\n")
    except OSError as e:
        with suppress(OSError):
            print_warning(f"{NOTE}: {note} cannot be written ({worded(e)})")
        return code
    return LOST if code == LOST else 0
