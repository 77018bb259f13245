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
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import torch.distributed as dist

from fastrepa.errors import CheckpointError, FastrepaError, print_error, printable
from fastrepa.runtime.exit_codes import LOST, for_launcher
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import World

GRACE = 5.0  # seconds in which a process may end by itself when the first rank is gone
log = logging.getLogger("fastrepa")


class Limits(Protocol):
    """Limits: a rank silent for `timeout_seconds` is lost, a step of `stall_seconds` stalls."""

    @property
    def timeout_seconds(self) -> float: ...

    @property
    def stall_seconds(self) -> float: ...


@contextmanager
def watched(run: Path, limits: Limits, world: World) -> Iterator[Watch]:
    """A run from before its building to after its last save: its rank's log, and the watch."""
    with (
        closing(RankLog(run, world)) as rank_log,
        Watch(limits, world, host_group_of(limits), rank_log) as watch,
    ):
        yield watch


def host_group_of(limits: Limits) -> Any:
    """A gloo group of all ranks, whose collectives may take two stalled steps (collective)."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * limits.stall_seconds))


class _OneLine(logging.Formatter):
    """A line for every message, which steers no terminal, whatever names and errors say."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class RankLog:
    """RUN/rank_N.log: this rank's warnings, errors and stacks. Only the first rank prints too.

    Raises CheckpointError where the run folder is not writable.
    """

    def __init__(self, run: Path, world: World) -> None:
        self.path = run / f"rank_{world.rank}.log"
        probe = run / f".writable_{world.rank}"
        try:
            run.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
        except OSError as e:
            raise CheckpointError(f"{run}: the run folder is not writable ({e})") from None
        self._handler = logging.StreamHandler(self.file)
        form = f"%(asctime)s {socket.gethostname()} rank {world.rank}: %(message)s"
        self._handler.setFormatter(_OneLine(form))
        log.addHandler(self._handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        self._show = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            log.warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)
            if world.is_rank_0:
                self._show(message, category, filename, lineno, *rest)

        warnings.showwarning = show  # type: ignore[assignment]
        log.info("joined, %d ranks, process %d", world.size, os.getpid())

    def stacks(self, why: str) -> None:
        """Log where every thread of this process is."""
        log.error("%s; every thread's stack:", why)
        with suppress(OSError):  # a full disk must not stop what comes after
            self.file.flush()
            faulthandler.dump_traceback(self.file, all_threads=True)

    def close(self) -> None:
        warnings.showwarning = self._show
        log.removeHandler(self._handler)
        self.file.close()


class Watch:
    """Ends this process, or explains its error, where another rank is lost (collective to enter).

    group: a gloo group of all ranks. Where a rank is silent or fails, all others have ended, naming
    it, within `timeout_seconds`. A step (or the building before the first) of more than
    `stall_seconds` puts every rank's stack in its log.
    """

    def __init__(self, limits: Limits, world: World, group: Any, rank_log: RankLog) -> None:
        self.limits, self.world, self.group, self.log = limits, world, group, rank_log
        self.interval = min(1.0, limits.timeout_seconds / 10)
        # What is left is for noticing it, for the others to read it and for ending.
        self.silence = limits.timeout_seconds - 4 * self.interval
        self._done = threading.Event()
        self._verdict: str | None = None
        self._code = LOST
        self._leaving: float | None = None  # when the main thread began to explain an error
        self._heard = self._progressed = time.monotonic()
        self._doing = "the start"
        self._stalled = self._stall = ""  # this rank's, to be told; the last that was told
        self._explained = False

    def __enter__(self) -> Watch:
        if self.world.size == 1:
            self._start(self._watch)
            return self
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        names: list[Any] = [None] * self.world.size
        dist.all_gather_object(names, socket.gethostname(), group=self.group)
        self._names = [f"rank {r} ({name})" for r, name in enumerate(names)]
        wait = timedelta(seconds=self.limits.timeout_seconds)
        port: list[Any] = [None]
        if self.world.is_rank_0:
            self._store = dist.TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=wait
            )
            port = [self._store.port]
        dist.broadcast_object_list(port, src=0, group=self.group)
        if not self.world.is_rank_0:
            self._store = dist.TCPStore(host, port[0], is_master=False, timeout=wait)
        self._store.set(f"beat/{self.world.rank}", "0")
        dist.barrier(group=self.group)
        self._heard = time.monotonic()
        self._start(self._beat, self._watch)
        return self

    def _start(self, *loops: Callable[[], None]) -> None:
        self._threads = [threading.Thread(target=f, name="watch", daemon=True) for f in loops]
        for thread in self._threads:
            thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if e is not None:
            self._explain(e)
        elif self.world.size > 1:
            dist.barrier(group=self.group)  # the store goes with the first rank
        self._done.set()
        for thread in self._threads:
            # One that is inside the store when Python ends would abort the process.
            thread.join(self.limits.timeout_seconds)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Explains an error where it happens, before what is around it is torn down."""
        try:
            yield
        except BaseException as e:
            self._explain(e)
            raise

    def _explain(self, e: BaseException) -> None:
        """Tell the others of this rank's error; end with theirs where it came from them."""
        if self._explained or self.world.size == 1:
            return
        self._explained, self._leaving = True, time.monotonic()
        log.error("stopped by an error", exc_info=e)
        if not isinstance(e, FastrepaError) and _is_of_peers(e):
            ends = time.monotonic() + self.limits.timeout_seconds + 2 * self.interval
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
        last_resort = threading.Timer(
            self.limits.timeout_seconds, lambda: os._exit(for_launcher(1) if code == 1 else 1)
        )
        last_resort.daemon = True
        last_resort.start()

    def progress(self, step: int) -> None:
        """The main thread is about to take this step."""
        self._doing, self._progressed = f"step {step + 1}", time.monotonic()

    # In threads -------------------------------------------------------------------------------

    def _beat(self) -> None:
        """All talk with the store, which may hang; `_watch` sees to that."""
        ranks = range(self.world.size) if self.world.is_rank_0 else [0]
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
                if self._stalled:
                    self._store.set("stall", self._stalled)
                    self._stalled = ""
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
            silent = [r for r, (_, at) in last.items() if now - at > self.silence]
            if silent and self._verdict is None:
                self._tell(self._lost(silent), LOST)

    def _watch(self) -> None:
        while not self._done.wait(self.interval / 2):
            now = time.monotonic()
            if self.world.size > 1:
                if self._verdict is None and now - self._heard > self.silence:
                    self._verdict = self._lost([0])
                if self._verdict:
                    if self.world.is_rank_0:
                        time.sleep(2 * self.interval)  # for the others to read it
                    # A main thread that is explaining may hang as well: the log's disk, say.
                    if self._leaving is None or now - self._leaving > self.limits.timeout_seconds:
                        self._end(self._verdict)
            if now - self._progressed > self.limits.stall_seconds:
                self._progressed = now
                seconds = self.limits.stall_seconds
                why = f"{self._doing} has taken more than {seconds:g} s"
                if self.world.is_rank_0:
                    say(f"warning: {why}; see {self.log.path}")
                if self.world.size == 1:
                    self.log.stacks(why)
                else:
                    self._stalled = f"{why} on {self._names[self.world.rank]}"

    def _lost(self, ranks: list[int]) -> str:
        names = ", ".join(self._names[r] for r in ranks)
        return f"{names} lost: silent for {self.silence:g} s"

    def _tell(self, verdict: str, code: int) -> None:
        self._code, self._verdict = code, verdict
        try:
            self._store.set("verdict", f"{code} {verdict}")
        except Exception as e:
            log.error("the heartbeat store does not answer: %s", _line(e))

    def _end(self, verdict: str) -> NoReturn:
        text = f"{verdict}; stopped in {self._doing}"
        if self._code == LOST:
            text += ", the same command continues"
        print_error(text, self.world.rank)
        code = for_launcher(self._code)
        anyway = threading.Timer(2 * self.interval, os._exit, (code,))  # the log's disk may hang
        anyway.daemon = True
        anyway.start()
        self.log.stacks(text)
        os._exit(code)


def _is_of_peers(e: BaseException) -> bool:
    """Tell whether an error is what a collective says when a peer has gone."""
    words = ("gloo", "nccl", "connection", "peer", "socket", "timed out", "store")
    return isinstance(e, dist.DistError) or (
        isinstance(e, RuntimeError) and any(w in str(e).lower() for w in words)
    )


def _line(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:500]
