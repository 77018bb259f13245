"""Signals that ask a run to stop: Ctrl-C, and what a machine sends before it takes itself away."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from fastrepa.runtime.exit_codes import REQUEUE
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import stated_rank

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ONE_KEY = 1.0  # seconds in which a launcher hands on the Ctrl-C that its ranks had themselves


class Stopped(SystemExit):
    """A signal came while a run had nothing to save yet; its code is REQUEUE."""

    def __init__(self, number: int) -> None:
        super().__init__(REQUEUE)
        self.number = number

    def __str__(self) -> str:
        return f"told to stop by {signal.Signals(self.number).name}"


class StopSignals:
    """Turns signals into a request to stop, while it is entered.

    asked: the number of the first signal that came, 0 before. Until `saves` is set, as there is
    nothing to save, a signal stops at once: with KeyboardInterrupt or `Stopped`. From then on only
    a second Ctrl-C does: systemd, cgroups, SLURM and launchers repeat theirs, and send SIGKILL when
    they have waited long enough. SIGHUP that is ignored stays so (nohup). Under torchrun its death
    is a SIGTERM, too (Linux): its ranks lead sessions of their own, and it dies of a second signal
    while it passes the first one on.
    """

    def __init__(self) -> None:
        self.asked, self.saves = 0, False
        self._interrupted: float | None = None
        # Joining a world of one sets RANK, too.
        self._launched = "RANK" in os.environ or "SLURM_STEP_ID" in os.environ

    def __enter__(self) -> StopSignals:
        # Batch scripts have their tasks ignore the signals that they pass on.
        hung_up = signal.SIGHUP if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else None
        heeded = [number for number in STOP_SIGNALS if number != hung_up]
        self._before = {number: signal.signal(number, self._handle) for number in heeded}
        _at_torchruns_death(signal.SIGTERM)
        return self

    def __exit__(self, kind: object, e: BaseException | None, tb: object) -> None:
        _at_torchruns_death(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(e, Stopped) and stated_rank() == 0:
            say(f"{e} before there was anything to save; the same command starts again")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now, before = time.monotonic(), self._interrupted
        if number == signal.SIGINT:
            self._interrupted = now
            again = before is not None and (now - before > _ONE_KEY or not self._launched)
            if again or not self.saves:
                raise KeyboardInterrupt
        elif not self.saves:
            raise Stopped(number)
        self.asked = self.asked or number


def _at_torchruns_death(number: int) -> None:
    """Have the kernel send a rank this signal when its launcher dies; 0: none."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
