"""The missing shards of a plan, made in this process or by several, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from fastrepa.commands.prepare.plan import ShardPlan, open_plan
from fastrepa.commands.prepare.writer import write_shard
from fastrepa.data.format.partial import join_writers
from fastrepa.runtime.progress import Bar
from fastrepa.runtime.spawn import go_on, run_jobs
from fastrepa.runtime.world import World

_LOOK = 2.0  # seconds between two looks at what the other ranks have finished


def write_shards(
    plan: ShardPlan,
    folder: Path,
    finished: set[int],
    *,
    workers: int,
    skip_bad: bool,
    world: World,
    progress: bool,
) -> None:
    """Make this rank's shards, those `finished` apart, with `workers` processes (0, 1: this one).

    Returns when all ranks are ready (collective). Raises what `write_shard` raises, and then leaves
    no worker behind.
    """
    missing = [s for s in range(world.rank, plan.num_shards, world.size) if s not in finished]
    with _Images(plan, folder, finished, world, progress and world.is_rank_0) as bar:
        if min(workers, len(missing)) > 1:
            _in_workers(plan, folder, missing, min(workers, len(missing)), skip_bad, bar.show)
        else:
            done = 0

            def image_done() -> None:
                nonlocal done
                done += 1
                bar.show(done)

            for shard in missing:
                write_shard(plan, folder, shard, skip_bad, image_done)
        world.wait(bar.tick)
        bar.finish()


class _Images(Bar):
    """Images done by all ranks, images/s and the time that remains."""

    def __init__(
        self, plan: ShardPlan, folder: Path, finished: set[int], world: World, visible: bool
    ) -> None:
        self._plan, self._folder, self._visible = plan, folder, visible
        self._others = [
            s for s in range(plan.num_shards) if s % world.size != world.rank and s not in finished
        ]
        self._elsewhere, self._own, self._looked = 0, 0, 0.0
        done = sum(len(plan.keys(shard)) for shard in finished)
        super().__init__(
            "preparing", plan.samples, "images", shown=visible, done=done, rate=True, stays=True
        )

    def show(self, own: int) -> None:
        if not self._visible:
            return
        self._own, now = own, time.monotonic()
        if self._others and now - self._looked > _LOOK:
            self._look(now)
        self.move(self._before + self._own + self._elsewhere)

    def tick(self) -> None:
        """Move on while this rank waits for the others."""
        self.show(self._own)

    def finish(self) -> None:
        """Move to the end, when every rank is ready."""
        self._elsewhere += sum(len(self._plan.keys(shard)) for shard in self._others)
        self._others = []
        self.show(self._own)

    def _look(self, now: float) -> None:
        names, self._looked = set(os.listdir(self._folder)), now
        ready = [s for s in self._others if f"shard-{s:05d}.done.json" in names]
        self._elsewhere += sum(len(self._plan.keys(shard)) for shard in ready)
        self._others = [shard for shard in self._others if shard not in set(ready)]


def _in_workers(
    plan: ShardPlan,
    folder: Path,
    missing: Sequence[int],
    workers: int,
    skip_bad: bool,
    show: Callable[[int], None],
) -> None:
    # Without locks, which a killed worker might never release: a count per shard.
    counts = multiprocessing.get_context("spawn").RawArray("I", plan.num_shards)
    seen = np.frombuffer(counts, dtype=np.uint32)
    run_jobs(
        _write_one,
        missing,
        workers,
        doing=str(plan.root),
        progress=lambda _: show(int(seen.sum())),
        start=_start_worker,
        arguments=(folder, skip_bad, counts),
    )


# Of a worker process, set once at its start.
_plan: ShardPlan
_folder: Path
_skip_bad: bool
_counts: Any


def _start_worker(folder: Path, skip_bad: bool, counts: Any) -> None:
    global _plan, _folder, _skip_bad, _counts
    join_writers(folder)
    parent = multiprocessing.parent_process()
    # Only now: a parent that dies later is succeeded by a run that waits for our lock.
    if parent is not None and connection.wait([parent.sentinel], timeout=0):
        os._exit(1)
    _plan, _folder, _skip_bad, _counts = open_plan(folder), folder, skip_bad, counts


def _write_one(shard: int) -> None:
    def image_done() -> None:
        _counts[shard] += 1
        go_on()

    write_shard(_plan, _folder, shard, _skip_bad, image_done)
