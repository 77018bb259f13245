"""A run's folder, held for one job; RUN/rank_N.log; and standard streams that a run outlives.

A full disk, or a reader that has gone, ends no training: what cannot be said is told once, where it
still can be.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from fastrepa.errors import CheckpointError, print_warning, printable, worded
from fastrepa.runtime.files import remove, sweep, temporary
from fastrepa.runtime.ownership import InUse, take
from fastrepa.runtime.world import World

log = logging.getLogger("fastrepa")


def hold(run: Path, held: ExitStack) -> None:
    """Let this process alone write to a run folder, which is made where it is missing, until `held`
    ends.

    Raises CheckpointError where another process has it, or where it is not writable.
    """
    try:
        held.callback(take(run, "fastrepa train"))
        for folder in (run / "checkpoints", run / "samples"):  # as `take` does with the run's own
            sweep(folder)
    except InUse as e:
        raise CheckpointError(str(e)) from None
    except OSError as e:
        raise _not_writable(run, e) from None


def _not_writable(run: Path, e: OSError) -> CheckpointError:
    return CheckpointError(f"{run}: the run folder is not writable ({worded(e)})")


class RankLog:
    """RUN/rank_N.log: this rank's warnings, errors and stacks. Only the first rank prints too.

    While it is open no failed write to it, to stdout or to stderr is an error.

    Raises CheckpointError where the run folder is not writable.
    """

    def __init__(self, run: Path, world: World) -> None:
        self.path = run / f"rank_{world.rank}.log"
        probe = temporary(self.path)
        try:
            run.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x" * 4096)
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
        except OSError as e:
            raise _not_writable(run, e) from None
        finally:
            remove(probe)
        self._before = sys.stdout, sys.stderr, logging.raiseExceptions
        self._hooks = warnings.showwarning, threading.excepthook
        self._streams = [_Lasting(stream, self._lost) for stream in self._before[:2]]
        sys.stdout, sys.stderr = self._streams
        logging.raiseExceptions = False  # libraries' logs go there as well
        self._handler = _Handler(self.file, world.is_rank_0)
        form = f"%(asctime)s {socket.gethostname()} rank {world.rank}: %(message)s"
        self._handler.setFormatter(_OneLine(form))
        log.addHandler(self._handler)
        log.setLevel(logging.INFO)
        log.propagate = False

        def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            log.warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)
            if world.is_rank_0:
                self._hooks[0](message, category, filename, lineno, *rest)

        def thread_ended(of: threading.ExceptHookArgs) -> None:
            """Say in a line what a library's thread died of, such as TensorBoard's."""
            log.error("a thread ended", exc_info=of.exc_value)
            if world.is_rank_0 and of.exc_value is not None:
                name = of.thread.name if of.thread else "a thread"
                print_warning(f"{name}: {of.exc_type.__name__}: {worded(of.exc_value)}")

        warnings.showwarning = show  # type: ignore[assignment]
        threading.excepthook = thread_ended
        log.info("joined, %d ranks, process %d", world.size, os.getpid())

    def stacks(self, why: str) -> None:
        """Log where every thread of this process is."""
        log.error("%s; every thread's stack:", why)
        with suppress(OSError):  # a full disk must not stop what comes after
            self.file.flush()
            faulthandler.dump_traceback(self.file, all_threads=True)

    def close(self) -> None:
        log.removeHandler(self._handler)
        with suppress(OSError):
            self.file.close()
        for stream in self._streams:
            stream.close()
        sys.stdout, sys.stderr, logging.raiseExceptions = self._before
        warnings.showwarning, threading.excepthook = self._hooks

    def _lost(self, stream: _Lasting, error: Exception) -> None:
        name = "stdout" if stream is self._streams[0] else "stderr"
        log.warning("%s: cannot be written (%s); training goes on", name, worded(error))


class _OneLine(logging.Formatter):
    """A line for every message, which steers no terminal, whatever names and errors say."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class _Handler(logging.StreamHandler[Any]):
    """Writes to a log as long as that can be; the first time that it cannot, rank 0 says so."""

    def __init__(self, file: Any, prints: bool) -> None:
        super().__init__(file)
        self._prints = prints

    def handleError(self, record: logging.LogRecord) -> None:
        if self._prints:
            self._prints = False
            why = worded(sys.exc_info()[1] or "")
            print_warning(f"{self.stream.name}: cannot be written ({why}); training goes on")


class _Lasting:
    """A standard stream that takes everything, and passes on what can be passed on."""

    def __init__(self, stream: Any, tell_lost: Any) -> None:
        self._stream, self._tell_lost = stream, tell_lost
        self._told = self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._pass_on(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._pass_on(self._stream.flush)

    def _pass_on(self, act: Any, *what: str) -> None:
        try:
            act(*what)
            self._lost = False
        except (OSError, ValueError) as e:  # ValueError: it was closed
            self._lost = True
            if not self._told:
                self._told = True
                self._tell_lost(self, e)

    def close(self) -> None:
        """Leave nothing in the stream that would fail when Python ends."""
        self.flush()
        if self._lost:
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
