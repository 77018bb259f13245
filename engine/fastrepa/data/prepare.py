"""A folder of class folders of images -> verified, shuffled shards (shards.py has the format).

Every image is listed, the list is shuffled once with the seed, and each run of `shard_size` files
becomes one shard, made start to finish by one worker. So the bytes depend on the images, the
settings and the version of Pillow, never on the number of workers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrepa.data.index import KEY_DIGITS
from fastrepa.data.listing import list_images, printable
from fastrepa.data.pool import write_shards
from fastrepa.data.shards import (
    EXTENSIONS,
    SOURCES,
    ClassRecord,
    FileRecord,
    ImageFormat,
    Manifest,
    SkippedRecord,
    write_manifest,
)
from fastrepa.data.writer import ShardJob, ShardResult
from fastrepa.errors import DataError, nearest


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did."""

    path: Path
    resolution: int
    counts: dict[str, int]  # samples of each class, in label order
    num_shards: int
    num_bytes: int  # of the whole folder
    skipped: list[tuple[str, str]]  # unreadable images left out (skip_bad), and why
    ignored: list[str]  # files in the source that are no images by their names
    seconds: float

    @property
    def num_samples(self) -> int:
        return sum(self.counts.values())


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    resolution: int,
    shard_size: int = 1000,
    image_format: ImageFormat = "png",
    quality: int = 95,
    seed: int = 0,
    workers: int | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Make the data set `out` from the class folders of `source`.

    Args:
        source: folder whose sub-folders are the classes; images lie anywhere below those, in any
            format that Pillow reads. Hidden files are passed over.
        out: folder to make; it must not exist yet, or be empty. It appears when complete.
        resolution: side of every image in pixels.
        shard_size: images per shard.
        image_format: "png" (lossless), "jpeg" (4:4:4) or "webp".
        quality: 1..100 for jpeg and webp; webp at 100 is lossless.
        seed: of the shuffle.
        workers: processes; None: one per available core; 0 or 1: this process.
        skip_bad: leave unreadable images out, and name them in the report and the manifest,
            instead of stopping at the first.
        progress: show a progress bar.

    Raises DataError, in one line, for whatever is wrong with source or out.
    """
    started = time.monotonic()
    source, out = Path(source), Path(out)
    _check_settings(resolution, shard_size, image_format, quality, seed)
    _check_places(source, out)
    listing = list_images(source)
    if len(listing.files) >= 10**KEY_DIGITS:
        raise DataError(f"{source}: more images than the {10**KEY_DIGITS - 1} that a set can hold")
    key = np.array([seed, 1], dtype=np.uint64)  # the reader's orders have 0 in the second word
    draws = np.random.Philox(key=key).random_raw(len(listing.files))
    order = np.argsort(draws, kind="stable")
    with _partial_folder(out) as folder:
        job = ShardJob(
            source=source,
            folder=folder,
            files=[listing.files[i] for i in order],
            labels=np.array(listing.labels, dtype=np.int32)[order],
            resolution=resolution,
            shard_size=shard_size,
            image_format=image_format,
            quality=quality,
            skip_bad=skip_bad,
        )
        workers = len(os.sched_getaffinity(0)) if workers is None else workers
        results = write_shards(job, workers, progress)
        manifest = _finish(job, listing.classes, results, seed)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return PrepareReport(
        path=out,
        resolution=resolution,
        counts={record.name: record.samples for record in manifest.classes},
        num_shards=len(manifest.shards),
        num_bytes=num_bytes,
        skipped=[(record.source, record.reason) for record in manifest.skipped],
        ignored=listing.ignored,
        seconds=time.monotonic() - started,
    )


def _check_settings(
    resolution: int, shard_size: int, image_format: str, quality: int, seed: int
) -> None:
    if image_format not in EXTENSIONS:
        raise DataError(
            f"image format {image_format!r} is not one of {', '.join(EXTENSIONS)}"
            + nearest(image_format, EXTENSIONS)
        )
    limits = {
        "resolution": (resolution, 1, 8192),
        "shard size": (shard_size, 1, 10**6),
        "quality": (quality, 1, 100),
        "seed": (seed, 0, 2**64 - 1),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise DataError(f"{name} {value} is outside {low}..{high}")


def _check_places(source: Path, out: Path) -> None:
    if not source.exists():
        raise DataError(f"{source}: no such folder")
    if not source.is_dir():
        raise DataError(f"{source}: not a folder of class folders")
    if out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out}: lies inside the source {source}; choose a place outside it")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: exists and is no folder")
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: exists and is not empty; nothing was changed")


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A sibling `.OUT.partial` to write in; renamed to `out` on success, removed on failure.

    One that a killed run left behind is taken over; one that a live run writes is an error.
    """
    partial = out.parent / f".{out.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(f"{out.parent}: cannot be written to ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for stale in partial.iterdir():
            stale.unlink()  # fails on a folder, which is none of ours
        try:
            yield partial
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except BlockingIOError:
        raise DataError(f"{out}: is being made by another fastrepa prepare") from None
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        os.close(lock)


def _finish(job: ShardJob, classes: list[str], results: list[ShardResult], seed: int) -> Manifest:
    """Write sources.jsonl and manifest.json beside the finished shards."""
    counts: Counter[int] = Counter()
    skipped: dict[int, SkippedRecord] = {}
    for result in results:
        counts.update(result.counts)
        skipped.update(result.skipped)
    for label, name in enumerate(classes):
        if not counts[label]:
            raise DataError(
                printable(f"{job.source / name}: class folder without a readable image")
            )
    with (job.folder / SOURCES).open("w", encoding="utf-8") as file:
        for key, source in enumerate(job.files):
            # json: one line whatever the name holds, bytes that are no UTF-8 included.
            file.write(json.dumps(None if key in skipped else source) + "\n")
    manifest = Manifest(
        resolution=job.resolution,
        image_format=job.image_format,
        quality=None if job.image_format == "png" else job.quality,
        seed=seed,
        num_samples=counts.total(),
        classes=tuple(
            ClassRecord(name=printable(name), samples=counts[label])
            for label, name in enumerate(classes)
        ),
        shards=tuple(result.record for result in results if result.record),
        sources=FileRecord.of(job.folder / SOURCES),
        skipped=tuple(skipped[key] for key in sorted(skipped)),
    )
    write_manifest(job.folder, manifest)
    return manifest
