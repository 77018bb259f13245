"""Every shard of a job, written in this process or by several, with a progress bar."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from fastrepa.data.spawn import clean_start, end_with_parent
from fastrepa.data.writer import ShardJob, ShardResult, write_shard
from fastrepa.errors import DataError


def write_shards(job: ShardJob, workers: int, progress: bool) -> list[ShardResult]:
    """Write all shards of a job with `workers` processes (0 or 1: this one); results in order.

    Raises what `write_shard` raises, and then leaves no worker behind.
    """
    num_shards = math.ceil(len(job.files) / job.shard_size)
    columns = (
        TextColumn("preparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images, {task.fields[rate]:.0f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=len(job.files), rate=0.0)
        started = time.monotonic()

        def show(done: int) -> None:
            rate = done / max(time.monotonic() - started, 1e-3)
            bar.update(task, completed=done, rate=rate)

        if min(workers, num_shards) > 1:
            return _in_workers(job, num_shards, min(workers, num_shards), show)
        # Without workers the files are done one after the other.
        return [
            write_shard(job, shard, lambda number: show(number + 1)) for shard in range(num_shards)
        ]


def _in_workers(
    job: ShardJob, num_shards: int, workers: int, show: Callable[[int], None]
) -> list[ShardResult]:
    context = multiprocessing.get_context("spawn")
    # Without locks, which a killed worker might never release: a mark per file, and a stop sign.
    done, stop = context.RawArray("B", len(job.files)), context.RawValue("B", 0)
    marks = np.frombuffer(done, dtype=np.uint8)
    with ProcessPoolExecutor(workers, context, _start_worker, (job, done, stop)) as pool:
        try:
            with clean_start():
                futures = [pool.submit(_write_one, shard) for shard in range(num_shards)]
            pending: set[Future[ShardResult]] = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                show(int(marks.sum()))
                for future in finished:
                    future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise DataError(
                f"{job.source}: a worker was killed, perhaps for want of memory; use fewer workers"
            ) from None
        finally:
            # After Ctrl-C or an error, running shards end at their next image.
            stop.value = 1
            pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Ends the work of a worker whose result nobody waits for any more."""


# Of a worker process, set once at its start.
_job: ShardJob
_image_done: Callable[[int], None]


def _start_worker(job: ShardJob, done: Any, stop: Any) -> None:
    global _image_done, _job
    end_with_parent()

    def image_done(number: int) -> None:
        done[number] = 1
        if stop.value:
            raise _StoppedError

    _job, _image_done = job, image_done


def _write_one(shard: int) -> ShardResult:
    return write_shard(_job, shard, _image_done)
