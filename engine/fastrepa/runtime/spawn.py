"""How worker processes of the data room start and end.

They start fresh ("spawn": no inherited CUDA context, locks or threads), without importing the
program that started them; they leave Ctrl-C to it; and they end when it does, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from types import ModuleType


@contextmanager
def clean_start() -> Iterator[None]:
    """Around the start of workers: they import nothing of `__main__` and never see Ctrl-C.

    Spawned processes import the main module again, which costs seconds where that imports torch,
    and recurses where it has no `if __name__ == "__main__"`. Nothing of ours lives there.
    """
    main = sys.modules["__main__"]
    # The tracker's own start would unblock SIGINT again, so it comes first.
    resource_tracker.ensure_running()
    # A blocked signal stays pending here, and is blocked from birth in the children.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def end_with_parent() -> None:
    """In a worker: exit at once when the process that started it is gone, even by SIGKILL.

    A worker waits on semaphores that nobody would ever post again. Does nothing in a process
    that multiprocessing did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
