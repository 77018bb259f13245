"""Worker processes of the data room: how they start and end, and a list of jobs done by several.

They start fresh ("spawn": no inherited CUDA context, locks or threads), without importing the
program that started them; they leave Ctrl-C to it; and they end when it does, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from types import ModuleType
from typing import Any, TypeVar

from fastrepa.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


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
    """Let a worker exit at once when the process that started it is gone, even by SIGKILL.

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


class StoppedError(Exception):
    """Ends the work of a worker whose result nobody waits for any more."""


def go_on() -> None:
    """Raise StoppedError once the jobs were given up; a job calls this often."""
    if _stop.value:
        raise StoppedError


def run_jobs(
    run: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    *,
    doing: str,
    progress: Callable[[list[Job]], None],
    start: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> list[Result]:
    """Call `run` with every job in `workers` fresh processes; return the results in their order.

    `start(*arguments)` is called first in each process. `progress` is told here, several times a
    second, the jobs that were finished since. The first error of a job is raised here; then, and
    after Ctrl-C, the jobs under way end at their next `go_on`, and no process is left behind.
    DataError, beginning with `doing`, when a worker is killed from outside.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("B", 0)  # without a lock, which a killed worker might never release
    with ProcessPoolExecutor(workers, context, _start, (stop, start, arguments)) as pool:
        try:
            with clean_start():
                futures = {pool.submit(run, job): job for job in jobs}
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress([futures[future] for future in finished])
                time.sleep(0.02)  # `wait` looks at every pending future: not once for each
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise DataError(
                f"{doing}: a worker was killed, perhaps for want of memory; use fewer workers"
            ) from None
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)


# Of a worker process, set once at its start.
_stop: Any


def _start(stop: Any, start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    global _stop
    end_with_parent()
    _stop = stop
    if start is not None:
        start(*arguments)
