"""A lost rank ends the others: heartbeats beside training, and a log file for every rank.

Each rank's threads beat once a second on a board that the first rank holds. The first rank notices
who has fallen silent and says so there; the others read that, and watch the first, which stays
until all have read it. What ends a process is os._exit, because its main thread may hang in a
collective for ever.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch.distributed as dist

from fastrepa.errors import FastrepaError, print_error, printable
from fastrepa.runtime.exit_codes import LOST, REQUEUE, for_launcher
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import World, address_of, of_rank_0, on_all

if TYPE_CHECKING:
    from fastrepa.runtime.rank_log import RankLog

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
    """A run from before its building to after its last save: its folder is held for this job alone,
    its rank has a log, and the watch begins (collective).

    Raises CheckpointError, on all ranks, where another process holds the folder or it cannot be
    written.
    """
    from fastrepa.runtime.rank_log import RankLog, hold

    with ExitStack() as held:
        of_rank_0(world, lambda: hold(run, held))
        rank_log = on_all(world, lambda: held.enter_context(closing(RankLog(run, world))))
        yield held.enter_context(Watch(limits, world, host_group_of(limits), rank_log))


def host_group_of(limits: Limits) -> Any:
    """A gloo group of all ranks, whose collectives may take two stalled steps (collective)."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * limits.stall_seconds))


class Watch:
    """Ends this process, or explains its error, where another rank is lost (collective to enter).

    group: a gloo group of all ranks. Where a rank is silent or fails, all others have ended, naming
    it, within `timeout_seconds`. A step (or the building before the first) of more than
    `stall_seconds` puts every rank's stack in its log. Both are seconds in which this process ran:
    a job that is suspended as a whole, and goes on, has lost nobody.
    """

    def __init__(self, limits: Limits, world: World, group: Any, rank_log: RankLog) -> None:
        self.limits, self.world, self.group, self.log = limits, world, group, rank_log
        self.interval = min(1.0, limits.timeout_seconds / 10)
        # What is left is for noticing it, for all others to read of it and for ending.
        self.silence = limits.timeout_seconds - 5 * self.interval
        self._clock = _Clock(self.interval)
        self._done = threading.Event()
        self._verdict: _Verdict | None = None
        self._leaving: float | None = None  # when the main thread began to explain an error
        self._heard = self._progressed = self._clock.seconds
        self._doing = "the start"
        self._stalled = self._stall = ""  # this rank's, to be told; the last that was told
        self._explained = False
        self._ending = threading.Lock()

    def __enter__(self) -> Watch:
        if self.world.size == 1:
            self._start(self._watch)
            return self
        names: list[Any] = [None] * self.world.size
        dist.all_gather_object(names, socket.gethostname(), group=self.group)
        self._names = [f"rank {r} ({name})" for r, name in enumerate(names)]
        self._board = Board(self.world, self.group, self.limits.timeout_seconds)
        self._board.write(f"beat/{self.world.rank}", "0")
        dist.barrier(group=self.group)
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
            with self.guard():
                dist.barrier(group=self.group)  # the board goes with the first rank
        self._done.set()
        for thread in self._threads:
            # One that is inside the board when Python ends would abort the process.
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
        self._explained, self._leaving = True, self._clock.seconds
        log.error("stopped by an error", exc_info=e)
        if not isinstance(e, FastrepaError) and is_of_peers(e):
            limit = self.limits.timeout_seconds + 2 * self.interval
            while self._verdict is None and self._clock.seconds - self._leaving < limit:
                time.sleep(self.interval / 4)
            if self._verdict:
                self._end(self._verdict)
            self._done.set()
            return
        code, words = _why(e)
        rank = self.world.rank
        self._tell(_Verdict(code, (rank,), f"{self._names[rank]} {words}"))
        self._until_all_know()
        self._done.set()
        # Leaving a process group may hang like any collective.
        last_resort = threading.Timer(
            self.limits.timeout_seconds, lambda: os._exit(for_launcher(1) if code == 1 else 1)
        )
        last_resort.daemon = True
        last_resort.start()

    def progress(self, step: int) -> None:
        """The main thread is about to take this step."""
        self._doing, self._progressed = f"step {step + 1}", self._clock.seconds

    # In threads -------------------------------------------------------------------------------

    def _beat(self) -> None:
        """All talk with the board, which may hang; `_watch` sees to that."""
        me = self.world.rank
        ranks = range(self.world.size) if self.world.is_rank_0 else [0]
        last = dict.fromkeys(ranks, ("", self._clock.seconds))
        count = 0
        while not self._done.wait(self.interval):
            try:
                count += 1
                self._board.write(f"beat/{me}", str(count))
                beats = self._board.read_all([f"beat/{r}" for r in ranks])
                now = self._clock.seconds
                for rank, beat in zip(ranks, beats, strict=True):
                    if beat and beat != last[rank][0]:
                        last[rank] = (beat, now)
                if self._verdict is None and (told := self._board.read("verdict")):
                    self._take(told)
                if self._stalled:
                    self._board.write("stall", self._stalled)
                    self._stalled = ""
                if (stall := self._board.read("stall")) and stall != self._stall:
                    self._stall = stall
                    self.log.stacks(stall)
            except Exception as e:
                if self._done.is_set():
                    return
                log.error("the heartbeat store does not answer: %s", _line(e))
                if self._verdict is None and not self._done.wait(min(GRACE, self.silence)):
                    ended = f"{self._names[0]} is lost: its process has ended"
                    self._verdict = _Verdict(LOST, (0,), ended)
                return
            self._heard = now
            silent = {r: now - at for r, (_, at) in last.items()}
            if self._verdict is None and max(silent.values()) > self.silence:
                # Ranks lost together, as with their host, last beat up to an interval apart.
                least = self.silence - 1.5 * self.interval
                self._tell(self._lost(tuple(r for r, seconds in silent.items() if seconds > least)))

    def _watch(self) -> None:
        while not self._done.wait(self.interval / 2):
            now = self._clock.tick()
            if self.world.size > 1:
                if self._verdict is None and now - self._heard > self.silence:
                    self._verdict = self._lost((0,))
                # A main thread that is explaining may hang as well: the log's disk, say.
                if self._verdict and (
                    self._leaving is None or now - self._leaving > self.limits.timeout_seconds
                ):
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

    def _lost(self, ranks: tuple[int, ...]) -> _Verdict:
        names = ", ".join(self._names[r] for r in ranks)
        return _Verdict(LOST, ranks, f"{names} lost: silent for {self.silence:g} s")

    def _tell(self, verdict: _Verdict) -> None:
        """Tell all others; where another verdict came first, that one is everybody's."""
        try:
            self._take(self._board.write_first("verdict", verdict.written()))
        except Exception as e:
            log.error("the heartbeat store does not answer: %s", _line(e))
            self._verdict = verdict

    def _take(self, told: str) -> None:
        """Make the board's verdict this rank's, and let the first rank know that it is known."""
        self._board.write(f"known/{self.world.rank}", "1")
        self._verdict = _Verdict.read(told)

    def _until_all_know(self) -> None:
        """Keep the board, which goes with the first rank, until all that can have read of it."""
        if not self.world.is_rank_0 or self._verdict is None:
            return
        others = [r for r in range(1, self.world.size) if r not in self._verdict.ranks]
        ends = time.monotonic() + 3 * self.interval
        with suppress(Exception):  # a board that does not answer any more tells nobody
            while not all(self._board.read_all([f"known/{r}" for r in others])):
                if time.monotonic() > ends:
                    return
                time.sleep(self.interval / 10)

    def _end(self, verdict: _Verdict) -> NoReturn:
        if not self._ending.acquire(blocking=False):  # the other thread is about it
            self._done.wait()
        text = f"{verdict.words}; stopped in {self._doing}"
        if verdict.code != 1:
            text += ", the same command continues"
        if verdict.code in (1, LOST) or self.world.is_rank_0:
            print_error(text, self.world.rank)
        code = for_launcher(verdict.code)
        anyway = threading.Timer(4 * self.interval, os._exit, (code,))  # the log's disk may hang
        anyway.daemon = True
        anyway.start()
        self.log.stacks(text)
        self._until_all_know()
        os._exit(code)


@dataclass(frozen=True)
class _Verdict:
    """Why all ranks end: with which exit code, and for which ranks, that are past knowing it."""

    code: int
    ranks: tuple[int, ...]
    words: str

    def written(self) -> str:
        return f"{self.code} {','.join(map(str, self.ranks))} {self.words}"

    @classmethod
    def read(cls, text: str) -> _Verdict:
        code, ranks, words = text.split(" ", 2)
        return cls(int(code), tuple(map(int, ranks.split(","))), words)


class _Clock:
    """Seconds in which this process ran: of a tick that came late, as after SIGSTOP, only as much
    counts as a busy machine may keep a thread waiting.
    """

    def __init__(self, interval: float) -> None:
        self.seconds, self._most, self._ticked = 0.0, interval, time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.seconds += min(now - self._ticked, self._most)
        self._ticked = now
        return self.seconds


class Board:
    """Where ranks leave one another words beside training (collective to make).

    A TCPStore that the first rank holds, listening on the address at which the others see it. A
    secret of the group's names every key and signs every value: who else reaches the port can
    neither end a run nor speak for a rank.
    """

    def __init__(self, world: World, group: Any, timeout_seconds: float) -> None:
        master = os.environ.get("MASTER_ADDR", "127.0.0.1")
        seen: list[Any] = [None] * world.size
        dist.all_gather_object(seen, address_of(master), group=group)
        wait = timedelta(seconds=timeout_seconds)
        meet: list[Any] = [None]
        if world.is_rank_0:
            # Its own name may be a loopback address on the first rank's host alone.
            host, listener = _listen(list(dict.fromkeys(reversed(seen))), master)
            port = listener.getsockname()[1]
            self._store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=wait,
                master_listen_fd=listener.detach(),
            )  # fmt: skip
            meet = [(host, port, secrets.token_bytes(32))]
        dist.broadcast_object_list(meet, src=0, group=group)
        host, port, self._secret = meet[0]
        if not world.is_rank_0:
            self._store = dist.TCPStore(host, port, is_master=False, timeout=wait)

    def write(self, key: str, value: str) -> None:
        self._store.set(self._name(key), self._signed(key, value))

    def write_first(self, key: str, value: str) -> str:
        """Write it, unless another rank did so before; returns what is there now."""
        self._store.compare_set(self._name(key), "", self._signed(key, value))
        if (there := self.read(key)) is None:  # not of ours
            self.write(key, value)
        return there or value

    def read(self, key: str) -> str | None:
        """Return what a rank wrote there; None where nothing is, or not by a rank."""
        return self.read_all([key])[0]

    def read_all(self, keys: Sequence[str]) -> list[str | None]:
        """As `read`, of several keys."""
        names = [self._name(key) for key in keys]
        if names and self._store.check(names):  # in two questions, however many ranks there are
            return list(map(self._genuine, keys, self._store.multi_get(names)))
        there = [self._store.check([name]) for name in names]
        return [
            self._genuine(key, self._store.get(name)) if is_there else None
            for key, name, is_there in zip(keys, names, there, strict=True)
        ]

    def _genuine(self, key: str, written: bytes) -> str | None:
        signature, _, value = written.decode(errors="replace").partition(" ")
        mac = self._mac(f"{key} {value}")
        return value if hmac.compare_digest(signature.encode(), mac.encode()) else None

    def _name(self, key: str) -> str:
        return f"{self._mac('keys')}/{key}"

    def _signed(self, key: str, value: str) -> str:
        return f"{self._mac(f'{key} {value}')} {value}"

    def _mac(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(errors="replace"), "sha256").hexdigest()


def _listen(addresses: Sequence[str], master: str) -> tuple[str, socket.socket]:
    """Return the first of the addresses that is this host's, and a socket that listens there; where
    none is, as behind a forwarded address, `master` and one on all interfaces.
    """
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            return address, socket.create_server((address, 0), family=family, backlog=4096)
        except OSError:
            continue
    return master, socket.create_server(("", 0), backlog=4096)


def _why(e: BaseException) -> tuple[int, str]:
    """Return with which exit code an error here ends the other ranks, and in which words."""
    if isinstance(e, KeyboardInterrupt):
        return 128 + signal.SIGINT, "was interrupted"
    if isinstance(e, SystemExit) and e.code == REQUEUE:
        return REQUEUE, f"was {e}"
    # A user's error would only come again.
    return 1 if isinstance(e, FastrepaError) else LOST, f"failed: {_line(e)}"


def is_of_peers(e: BaseException) -> bool:
    """Tell whether an error is what a collective says when a peer has gone."""
    words = ("gloo", "nccl", "connection", "peer", "socket", "timed out", "store")
    return isinstance(e, dist.DistError) or (
        isinstance(e, RuntimeError) and any(w in str(e).lower() for w in words)
    )


def _line(e: BaseException) -> str:
    return printable(f"{type(e).__name__}: {' '.join(str(e).split())}"[:500])
