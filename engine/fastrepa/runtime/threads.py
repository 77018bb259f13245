"""The CPU threads of a training process: how many compute, and how they wait for one another.

OpenMP's threads meet at the end of every operation. By default each then spins for milliseconds,
which is the fastest on an idle machine; where others want the cores too, it spins away what the
thread that it waits for would need. No count is right always, and how threads wait can be said
only before torch is loaded. So they spin shortly, or not at all where the machine is busy when a
run starts, and a busy run tries several counts in its first steps (docs/measuring.md, On a CPU).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from fastrepa.runtime.hardware import usable_cores
from fastrepa.runtime.world import World, launched_world

COUNT, SPIN, POLICY = "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
SHORT, NONE = "10000", "0"
"""Of GOMP_SPINCOUNT: long enough for operations that follow each other, and for a busy machine."""
BUSY = 0.25  # of the cores' time, from which on others are said to need them
WARM, TRIED, WINDOW = 3, 3, 20
"""Steps: the first, slow in any case; of a count's trial; between two looks at the rate."""
BETTER = 0.9  # of the time of more threads, below which fewer are chosen

_ours: dict[str, str] = {}  # what before_torch has put into the environment


def before_torch(load: Callable[[], float | None] = lambda: None) -> None:
    """Tell OpenMP, which asks once, what the user has not: how to wait, and the cores of a quota.

    load: `others`, or that nobody knows. Does nothing where torch is loaded, or there is a GPU.
    """
    if _too_late():
        return
    if not any(map(_of_the_user, (SPIN, POLICY))):
        _put(SPIN, NONE if (load() or 0.0) > BUSY else SHORT)
    cores = usable_cores()
    launched = COUNT in os.environ  # by torchrun, which takes 1 where it was not told
    if not _of_the_user(COUNT) and (launched or cores < (os.cpu_count() or 1)):
        _put(COUNT, str(max(1, cores // launched_world().local_size)))


def others(windows: int = 3, seconds: float = 0.2) -> float | None:
    """Return the share of the usable cores' time that others take while this process rests: the
    least of some short windows. None where the machine does not say.
    """
    shares = []
    for _ in range(windows):
        before = _ticks()
        time.sleep(seconds)
        total, idle = (now - then for now, then in zip(_ticks(), before, strict=True))
        if total <= 0:
            return None
        shares.append(1 - idle / total)
    return max(0.0, min(shares))


class Threads:
    """The number of threads of the next step; tried where `trial` is set, and again where the rate
    falls below half of its best, or rises by half while there are cores to spare.

    The first rank measures, and all follow: see `wanted` and `follow`. free: it may change at all.
    why: words for the run's first line.
    """

    def __init__(
        self, count: int, most: int, why: str, *, trial: bool = False, free: bool = False
    ) -> None:
        self.count = self.wanted = count
        self.most, self.why, self.free = most, why, free
        self.news = ""  # of a switch, until somebody takes it
        self._skip, self._window = WARM, WINDOW
        self._times: list[float] = []
        self._best = self._won = 0.0  # seconds a step, since the last trial and in it
        self._tried: dict[int, float] = {}
        self._untried = candidates(most) if trial and free else []
        self._before = count

    def took(self, seconds: float) -> None:
        """Take in what a step took with `count` threads."""
        if not self.free or self.count != self.wanted:  # a switch is under way
            return
        if self._skip:
            self._skip -= 1
            return
        self._times.append(seconds)
        if self._untried and len(self._times) == TRIED:
            self._tried[self.count] = statistics.median(self._times)
            self._times.clear()
            self._untried.remove(self.count)
            self._choose()
        elif not self._untried and len(self._times) == self._window:
            now = statistics.median(self._times)
            self._times.clear()
            self._look(now)

    def _look(self, now: float) -> None:
        """Begin a trial where the last steps are far from what they were."""
        self._won = self._won or now
        self._best = min(self._best or now, now)
        roomy = self.count < self.most and now < self._won / 1.5
        if self.most > 1 and (now > 2 * self._best or roomy):
            self._untried, self._before = candidates(self.most), self.count
            if self.count not in self._untried:
                self._untried.append(self.count)
            self._tried.clear()
            self.wanted = self._untried[0]

    def _choose(self) -> None:
        """Go on to the next count of a trial, or end it with the fastest."""
        if self._untried:
            self.wanted = self._untried[0]
            return
        counts = sorted(self._tried, reverse=True)
        best = counts[0]
        for count in counts[1:]:
            if self._tried[count] < BETTER * self._tried[best]:
                best = count
        self.wanted, self._won = best, self._tried[best]
        self._best = self._won
        if best == self._before:  # the more often that is so, the rarer the next look
            self._window = min(2 * self._window, 64 * WINDOW)
            return
        self._window = WINDOW
        times = ", ".join(f"{n}: {1000 * self._tried[n]:.0f} ms" for n in counts)
        self.news = (
            f"threads: {best} from here on, {self._before} before (a step with {times}); "
            "another number of threads rounds otherwise"
        )

    def take_news(self) -> str:
        """Return words for a switch, once."""
        news, self.news = self.news, ""
        return news

    def follow(self, wanted: int) -> None:
        """Take the next step with as many threads as the first rank wants; 0: as now."""
        wanted = min(wanted or self.count, max(self.most, self.count))
        if wanted != self.count:
            import torch

            torch.set_num_threads(wanted)
            self.count, self._skip = wanted, 1


def candidates(most: int) -> list[int]:
    """The counts that a trial compares, of at most so many threads: the most come first."""
    return sorted({most, *([most // 4] if most >= 8 else []), 1}, reverse=True)


def choose_threads(
    world: World, configured: int | None, recorded: int, *, deterministic: bool
) -> Threads:
    """Decide with how many threads a run begins, and set it.

    configured: by the run's configuration. recorded: in its checkpoint, 0 where there is none.
    """
    import torch

    now = torch.get_num_threads()
    if world.device.type != "cpu" and not configured:
        return Threads(now, now, "")
    cores = max(1, usable_cores() // world.local_size)
    most, trial, free = min(now, cores), False, False
    count = most
    if configured:
        count, why = configured, "training.threads"
    elif _of_the_user(COUNT):
        count, why = now, COUNT
    elif deterministic:
        count, why = min(recorded or most, most), "deterministic"
    elif recorded:
        count, why, free = min(recorded, most), "as before", True
    else:
        free = True
        load = others() if world.is_rank_0 and most > 1 else 0.0
        trial = load is None or load > BUSY
        tried = f"the first steps try {' and '.join(map(str, candidates(most)))}"
        why = "machine idle"
        if trial:
            why = f"others take {load:.0%}, {tried}" if load else f"load unknown, {tried}"
    if recorded not in (0, count):
        why += f", {recorded} before: it rounds otherwise"
    if count != now:
        torch.set_num_threads(count)
    said = f"threads {count} of {cores}{_waiting(os.environ)}: {why}"
    return Threads(count, most, said, trial=trial, free=free and world.is_rank_0)


def _waiting(environment: Mapping[str, str]) -> str:
    """Words for how the threads wait, where that is known."""
    spin, policy = environment.get(SPIN), environment.get(POLICY, "").lower()
    if spin is None:
        return f", {policy}" if policy else ""
    return ", passive" if spin == NONE else f", spinning {spin}"


def _put(name: str, value: str) -> None:
    os.environ[name] = _ours[name] = value


def _of_the_user(name: str) -> bool:
    """Say whether the user has set it: not this process, and not torchrun, whose own environment,
    before it began to change it, is what its ancestors in /proc have.
    """
    if name not in os.environ or _ours.get(name) == os.environ[name]:
        return False
    if name != COUNT or "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    pid = os.getppid()
    with suppress(OSError, ValueError):
        while b"TORCHELASTIC_RUN_ID=" in (environment := _environment(pid)):
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rpartition(")")[2].split()[1])
        return any(line.startswith(name.encode() + b"=") for line in environment.split(b"\0"))
    return True


def _environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def _ticks() -> tuple[int, int]:
    """The clock ticks so far of the cores that this process may use: all, and the idle ones."""
    total = idle = 0
    with suppress(OSError, ValueError, AttributeError):
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        for line in Path("/proc/stat").read_text().splitlines():
            name, *ticks = line.split()
            if name in mine:
                counted = list(map(int, ticks[:8]))  # what guests take is in the first
                total, idle = total + sum(counted), idle + counted[3] + counted[4]
    return total, idle


def _too_late() -> bool:
    """Say whether torch is loaded; or there is a GPU, which leaves little to the CPU."""
    gpu = os.path.exists("/dev/nvidiactl") and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return gpu or "torch" in sys.modules
