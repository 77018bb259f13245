"""A lost rank ends the others: heartbeats beside training, and a log file for every rank.

Each rank's threads beat once a second in a TCPStore that the first rank holds. The first rank
notices who has fallen silent and says so there; the others read that, and watch the first. What
ends a process is os._exit, because its main thread may hang in a collective for ever.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from fastrepa.config import SurvivalConfig
from fastrepa.errors import FastrepaError, print_error
from fastrepa.training.zero import World

LOST = 76  # exit code: a rank was lost; the launch files start the run again
GRACE = 5.0  # seconds in which a process may end by itself when the first rank is gone
log = logging.getLogger("fastrepa")


class RankLog:
    """RUN/rank_N.log: this rank's warnings, errors and stacks. Only the first rank prints too."""

    def __init__(self, run: Path, world: World) -> None:
        self.path = run / f"rank_{world.rank}.log"
        run.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a", encoding="utf-8", buffering=1)
        self._handler = logging.StreamHandler(self.file)
        form = f"%(asctime)s {socket.gethostname()} rank {world.rank}: %(message)s"
        self._handler.setFormatter(logging.Formatter(form))
        log.addHandler(self._handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        self._show = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            log.warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)
            if world.is_first:
                self._show(message, category, filename, lineno, *rest)

        warnings.showwarning = show  # type: ignore[assignment]
        log.info("joined, %d ranks, process %d", world.size, os.getpid())

    def stacks(self, why: str) -> None:
        """Where every thread of this process is."""
        log.error("%s; every thread's stack:", why)
        self.file.flush()
        faulthandler.dump_traceback(self.file, all_threads=True)

    def close(self) -> None:
        warnings.showwarning = self._show
        log.removeHandler(self._handler)
        self.file.close()


class Watch:
    """Ends this process, or explains its error, where another rank is lost (collective to enter).

    group: a gloo group of all ranks. A rank that is silent for `timeout_seconds`, or that fails, is
    named on every other. A step of more than `stall_seconds` puts every rank's stack in its log.
    """

    def __init__(self, config: SurvivalConfig, world: World, group: Any, rank_log: RankLog) -> None:
        self.config, self.world, self.group, self.log = config, world, group, rank_log
        self.interval = min(1.0, config.timeout_seconds / 5)
        self._done = threading.Event()
        self._verdict: str | None = None
        self._code, self._leaving = LOST, False
        self._heard = self._progressed = time.monotonic()
        self._step, self._stall = -1, ""

    def __enter__(self) -> Watch:
        if self.world.size == 1:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
            return self
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        names: list[Any] = [None] * self.world.size
        dist.all_gather_object(names, socket.gethostname(), group=self.group)
        self._names = [f"rank {r} ({name})" for r, name in enumerate(names)]
        wait = timedelta(seconds=self.config.timeout_seconds)
        port: list[Any] = [None]
        if self.world.is_first:
            self._store = dist.TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=wait
            )
            port = [self._store.port]
        dist.broadcast_object_list(port, src=0, group=self.group)
        if not self.world.is_first:
            self._store = dist.TCPStore(host, port[0], is_master=False, timeout=wait)
        self._store.set(f"beat/{self.world.rank}", "0")
        dist.barrier(group=self.group)
        self._heard = time.monotonic()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Explains an error: one that another rank caused is raised as a TrainingError of it."""
        if self.world.size == 1 or e is None:
            if self.world.size > 1:
                dist.barrier(group=self.group)  # the store goes with the first rank
            self._done.set()
            return
        self._leaving = True
        log.error("stopped by an error", exc_info=(kind, e, tb))  # type: ignore[arg-type]
        if not isinstance(e, FastrepaError) and _is_of_peers(e):
            ends = time.monotonic() + self.config.timeout_seconds + 2 * self.interval
            while self._verdict is None and time.monotonic() < ends:
                time.sleep(self.interval / 4)
            self._done.set()
            if self._verdict:
                self._end(self._verdict)
            return
        code = 1 if isinstance(e, FastrepaError) else LOST  # a user's error would only come again
        self._tell(f"{self._names[self.world.rank]} failed: {_line(e)}", code)
        time.sleep(2 * self.interval)  # the first rank's store must outlive the reading of it
        self._done.set()
        # Leaving a process group may hang like any collective.
        last_resort = threading.Timer(self.config.timeout_seconds, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()

    def progress(self, step: int) -> None:
        """The main thread is about to take this step."""
        self._step, self._progressed = step, time.monotonic()

    # In threads -------------------------------------------------------------------------------

    def _beat(self) -> None:
        """All talk with the store, which may hang; `_watch` sees to that."""
        ranks = range(self.world.size) if self.world.is_first else [0]
        last = dict.fromkeys(ranks, (b"", time.monotonic()))
        count = 0
        while not self._done.wait(self.interval):
            try:
                count += 1
                self._store.set(f"beat/{self.world.rank}", str(count))
                beats = self._store.multi_get([f"beat/{r}" for r in ranks])
                now = time.monotonic()
                for rank, beat in zip(ranks, beats, strict=True):
                    if beat != last[rank][0]:
                        last[rank] = (beat, now)
                if self._store.check(["verdict"]):
                    code, _, verdict = self._store.get("verdict").decode().partition(" ")
                    if self._verdict is None:
                        self._code, self._verdict = int(code), verdict
                if self._store.check(["stall"]):
                    stall = self._store.get("stall").decode()
                    if stall != self._stall:
                        self._stall = stall
                        self.log.stacks(stall)
            except Exception as e:
                log.error("the heartbeat store does not answer: %s", _line(e))
                if self._verdict is None and not self._done.wait(GRACE):
                    self._verdict = f"{self._names[0]} is lost: its process has ended"
                return
            self._heard = now
            silent = [r for r, (_, at) in last.items() if now - at > self.config.timeout_seconds]
            if silent and self._verdict is None:
                self._tell(self._lost(silent), LOST)

    def _watch(self) -> None:
        while not self._done.wait(self.interval / 2):
            now = time.monotonic()
            if self.world.size > 1:
                if self._verdict is None and now - self._heard > self.config.timeout_seconds:
                    self._verdict = self._lost([0])
                if self._verdict:
                    time.sleep(2 * self.interval)  # for the others to read it
                    if not self._leaving:
                        self._end(self._verdict)
            if now - self._progressed > self.config.stall_seconds:
                self._progressed = now
                seconds = self.config.stall_seconds
                why = f"step {self._step + 1} has taken more than {seconds:g} s"
                if self.world.is_first:
                    print(f"warning: {why}; see {self.log.path}", flush=True)
                if self.world.size == 1:
                    self.log.stacks(why)
                else:
                    self._store.set("stall", f"{why} on {self._names[self.world.rank]}")

    def _lost(self, ranks: list[int]) -> str:
        names = ", ".join(self._names[r] for r in ranks)
        return f"{names} lost: silent for {self.config.timeout_seconds:g} s"

    def _tell(self, verdict: str, code: int) -> None:
        self._code, self._verdict = code, verdict
        try:
            self._store.set("verdict", f"{code} {verdict}")
        except Exception as e:
            log.error("the heartbeat store does not answer: %s", _line(e))

    def _end(self, verdict: str) -> NoReturn:
        text = f"{verdict}; stopped in step {self._step + 1}, the same command continues"
        self.log.stacks(text)
        print_error(text, self.world.rank)
        os._exit(self._code)


def _is_of_peers(e: BaseException) -> bool:
    """Whether an error is what a collective says when a peer has gone."""
    words = ("gloo", "nccl", "connection", "peer", "socket", "timed out", "store")
    return isinstance(e, dist.DistError) or (
        isinstance(e, RuntimeError) and any(w in str(e).lower() for w in words)
    )


def _line(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:500]
