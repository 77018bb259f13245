"""One shard, from source images to a finished tar and its index."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastrepa.data.images import UnreadableImageError, encode, load_square
from fastrepa.data.index import INDEX_DTYPE, KEY_DIGITS
from fastrepa.data.listing import printable
from fastrepa.data.shards import EXTENSIONS, FileRecord, ImageFormat, ShardRecord, SkippedRecord
from fastrepa.errors import DataError


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs to make any shard of a set."""

    source: Path
    folder: Path  # where the shards are written
    files: list[str]  # relative to source, shuffled; the place in the list is the sample's key
    labels: np.ndarray  # int32 [files]
    resolution: int
    shard_size: int
    image_format: ImageFormat
    quality: int
    skip_bad: bool


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard."""

    record: ShardRecord | None  # None: no image of it was readable
    counts: Counter[int] = field(default_factory=Counter)  # samples by label
    skipped: dict[int, SkippedRecord] = field(default_factory=dict)  # by key


def write_shard(job: ShardJob, shard: int, image_done: Callable[[int], None]) -> ShardResult:
    """Write shard number `shard` of a job and its index; `image_done` gets each file's number.

    Raises DataError for an unreadable image unless job.skip_bad, OSError when writing fails.
    """
    path = job.folder / f"shard-{shard:05d}.tar"
    index_path = path.with_suffix(".idx.npy")
    skipped: dict[int, SkippedRecord] = {}
    rows = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        first = shard * job.shard_size
        for number in range(first, min(first + job.shard_size, len(job.files))):
            file, label = job.files[number], int(job.labels[number])
            try:
                image = load_square(job.source / file, job.resolution)
            except UnreadableImageError as error:
                if not job.skip_bad:
                    reason = f"{job.source / file}: unreadable image ({error})"
                    raise DataError(printable(reason)) from None
                skipped[number] = SkippedRecord(
                    source=printable(file), reason=printable(str(error))
                )
                image_done(number)
                continue
            key = f"{number:0{KEY_DIGITS}d}"
            data = encode(image, job.image_format, job.quality)
            offset = _add(tar, f"{key}.{EXTENSIONS[job.image_format]}", data)
            _add(tar, f"{key}.cls", b"%d" % label)
            rows.append((key, label, offset, len(data), zlib.crc32(data)))
            image_done(number)
    if not rows:
        os.unlink(path)
        return ShardResult(None, skipped=skipped)
    index = np.array(rows, dtype=INDEX_DTYPE)
    np.save(index_path, index)
    tar_record = FileRecord.of(path).model_dump()
    record = ShardRecord(**tar_record, samples=len(rows), index=FileRecord.of(index_path))
    return ShardResult(record, Counter(index["label"].tolist()), skipped)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without owner, time or other traces; returns the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - (len(data) + 511) // 512 * 512
