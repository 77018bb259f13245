"""One shard, from source images to a finished tar, its index, and the mark that it is done."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from fastrepa.commands.prepare.plan import ShardPlan
from fastrepa.data.format.index import INDEX_DTYPE, KEY_DIGITS
from fastrepa.data.format.shards import EXTENSIONS, FileRecord, ShardRecord, SkippedRecord
from fastrepa.data.images import Stored, UnreadableImageError, store
from fastrepa.data.sources.entries import Listing, read_entry
from fastrepa.errors import DataError, printable
from fastrepa.runtime.files import NewFile, write_array, write_whole

# What the system says of a path that the source itself has wrong; anything else (a failing disk,
# too many open files) is no property of the image, and is never skipped.
_WRONG_PATHS = {errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG,
                errno.ENOTDIR, errno.EPERM}  # fmt: skip


class ShardDone(BaseModel):
    """`shard-00000.done.json`: what became of one shard. Written when its files are on the disk."""

    model_config = ConfigDict(extra="forbid")

    record: ShardRecord | None  # None: no image of it was readable
    counts: dict[int, int]  # samples by label
    skipped: dict[int, SkippedRecord]  # by key
    hashes: list[str]  # BLAKE2b of each stored image, in the order of the index
    sides: list[tuple[int, int]]  # width and height of their sources
    formats: dict[str, int]
    modes: dict[str, int]
    traits: dict[str, int]  # how many were animated, enlarged, original, misnamed, dim

    def is_whole(self, folder: Path) -> bool:
        """Tell whether the files lie there with their sizes."""
        files = (self.record, self.record.index) if self.record else ()
        try:
            return all((folder / file.file).stat().st_size == file.bytes for file in files)
        except FileNotFoundError:
            return False


TRAITS = ("animated", "enlarged", "original", "misnamed", "dim")


def read_done(folder: Path, shard: int) -> ShardDone | None:
    """The mark of a finished shard; None where it is not finished."""
    try:
        done = ShardDone.model_validate_json((folder / f"shard-{shard:05d}.done.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return done if done.is_whole(folder) else None


def write_shard(
    plan: ShardPlan, folder: Path, shard: int, skip_bad: bool, image_done: Callable[[], None]
) -> None:
    """Make one shard of a plan in `folder`; `image_done` is called after every image.

    Raises DataError for an unreadable image unless skip_bad, OSError when writing fails.
    """
    name = f"shard-{shard:05d}"
    listing, keys, settings = plan.part(shard), plan.keys(shard), plan.settings
    done = ShardDone(
        record=None, counts={}, skipped={}, hashes=[], sides=[], formats={}, modes={}, traits={}
    )
    counts: dict[str, Counter[str]] = {"formats": Counter(), "modes": Counter()}
    traits: Counter[str] = Counter(dict.fromkeys(TRAITS, 0))
    rows = []
    with NewFile(folder / f"{name}.tar") as file:
        # Python's type for a file is wider than the two methods that tarfile needs.
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for number, key_number in enumerate(keys):
                try:
                    stored = _stored(plan, listing, number)
                except UnreadableImageError as error:
                    source = listing.names[number]
                    if not skip_bad:
                        where = f"{plan.root / source}: unreadable image ({error})"
                        raise DataError(printable(f"{where}; --skip-bad leaves such out")) from None
                    done.skipped[key_number] = SkippedRecord(
                        source=printable(source), reason=printable(str(error))
                    )
                    image_done()
                    continue
                key, label = f"{key_number:0{KEY_DIGITS}d}", int(listing.entries[number]["label"])
                data = stored.data
                offset = _add(tar, f"{key}.{EXTENSIONS[settings.image_format]}", data)
                _add(tar, f"{key}.cls", b"%d" % label)
                rows.append((key, label, offset, len(data), zlib.crc32(data)))
                done.hashes.append(hashlib.blake2b(data, digest_size=16).hexdigest())
                done.sides.append((stored.width, stored.height))
                counts["formats"][stored.format] += 1
                counts["modes"][stored.mode] += 1
                traits.update(trait for trait in TRAITS if getattr(stored, trait))
                image_done()
        if rows:
            sha256 = file.finish()
            tar_record = FileRecord(file=f"{name}.tar", bytes=file.num_bytes, sha256=sha256)
    if rows:
        index = np.array(rows, dtype=INDEX_DTYPE)
        write_array(folder / f"{name}.idx.npy", index)
        done.record = ShardRecord(
            **tar_record.model_dump(),
            samples=len(rows),
            index=FileRecord.of(folder / f"{name}.idx.npy"),
        )
        done.counts = dict(Counter(index["label"].tolist()))
    done.formats, done.modes, done.traits = counts["formats"], counts["modes"], traits
    write_whole(folder / f"{name}.done.json", json.dumps(done.model_dump()).encode())


def _stored(plan: ShardPlan, listing: Listing, number: int) -> Stored:
    name, settings = listing.names[number], plan.settings
    try:
        data = read_entry(listing, number)
    except OSError as error:
        if error.errno not in _WRONG_PATHS:
            raise DataError(
                printable(f"{plan.root / name}: cannot be read ({error.strerror})")
            ) from None
        raise UnreadableImageError(error.strerror) from None
    except DataError as error:
        reason = str(error).removeprefix(printable(f"{plan.root / name}: "))
        raise UnreadableImageError(reason.removeprefix(printable(f"{plan.root}/"))) from None
    return store(data, settings.resolution, settings.image_format, settings.quality or 100, name)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without owner, time or other traces; returns the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - (len(data) + 511) // 512 * 512
