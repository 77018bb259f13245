"""A preparation's plan, on disk: every image in its shuffled place, and the settings.

    plan.entries.npy   [n] of ENTRY_DTYPE, shuffled: the place is the sample's key
    plan.names         the entries' names in UTF-8, one after the other
    plan.ends.npy      int64 [n]: where each name ends
    plan.json          settings, classes, containers and the source's fingerprint; written last

Every process opens the files and reads the part of the shard that it makes. A later run goes on
only with the same settings and the same source.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from pydantic import BaseModel, ConfigDict, ValidationError

from fastrepa.data.format.partial import PLAN
from fastrepa.data.format.shards import ImageFormat
from fastrepa.data.sources.entries import Listing
from fastrepa.errors import DataError, printable
from fastrepa.reading.arrays import map_npy
from fastrepa.reading.text import parse_json
from fastrepa.runtime.files import write_array, write_whole

_ENTRIES, _NAMES, _ENDS = "plan.entries.npy", "plan.names", "plan.ends.npy"
VERSION = 1


class Settings(BaseModel):
    """All that the bytes of a set depend on, beside its source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resolution: int
    shard_size: int
    image_format: ImageFormat
    quality: int | None  # None: png
    seed: int
    pillow: str = PIL.__version__


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int
    settings: Settings
    fingerprint: str
    samples: int
    root: str
    classes: list[str]
    containers: list[str]
    rejected: list[tuple[str, str]]
    ignored: list[str]
    unread: list[str] = []  # not in older plans


@dataclass(frozen=True)
class ShardPlan:
    """A preparation's plan that was opened: which image goes to which shard."""

    settings: Settings
    classes: list[str]
    root: Path
    containers: list[Path]
    rejected: list[tuple[str, str]]  # (printable name, reason)
    ignored: list[str]
    unread: list[str]  # of those ignored: pictures by their first bytes
    entries: np.ndarray  # [n] of ENTRY_DTYPE, memory-mapped
    _ends: np.ndarray
    _names: Path

    @property
    def samples(self) -> int:
        return len(self.entries)

    @property
    def num_shards(self) -> int:
        return math.ceil(self.samples / self.settings.shard_size)

    def keys(self, shard: int) -> range:
        """The keys of the samples of one shard."""
        first = shard * self.settings.shard_size
        return range(first, min(first + self.settings.shard_size, self.samples))

    def part(self, shard: int) -> Listing:
        """The entries of one shard, to be read."""
        keys = self.keys(shard)
        return Listing(
            root=self.root,
            classes=self.classes,
            containers=self.containers,
            entries=np.array(self.entries[keys.start : keys.stop]),
            names=self.names(keys),
        )

    def names(self, keys: range) -> list[str]:
        """The names of the sources of some consecutive samples."""
        if not keys:
            return []
        start = int(self._ends[keys.start - 1]) if keys.start else 0
        ends = self._ends[keys.start : keys.stop] - start
        with self._names.open("rb") as file:
            file.seek(start)
            raw = file.read(int(ends[-1]))
        starts = [0, *ends[:-1].tolist()]
        return [os.fsdecode(raw[a:b]) for a, b in zip(starts, ends.tolist(), strict=True)]


def read_settings(folder: Path) -> Settings | None:
    """The settings that a partial folder was begun with; None where it has no plan."""
    record = _read(folder)
    return None if record is None else record.settings


def write_plan(folder: Path, listing: Listing, settings: Settings) -> None:
    """Write the plan, or, where there is one, check that it is the plan of the same work.

    A plan of which no shard is finished is replaced. Raises DataError that says what differs.
    """
    fingerprint = _fingerprint(folder, listing)
    before = _read(folder) if any(folder.glob("shard-*.done.json")) else None
    if before is not None:
        check_settings(folder, before.settings, settings)
        if before.fingerprint != fingerprint:
            raise DataError(
                f"{listing.root}: has changed since {folder} was begun"
                f" ({_what_changed(open_plan(folder), listing)}); {_start_again(folder)}"
            )
    else:
        order = shuffled(len(listing.entries), settings.seed)
        names = [os.fsencode(listing.names[i]) for i in order]
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        write_whole(folder / _NAMES, b"".join(names))
        write_array(folder / _ENDS, ends)
        write_array(folder / _ENTRIES, listing.entries[order])
    record = _Record(
        version=VERSION,
        settings=settings,
        fingerprint=fingerprint,
        samples=len(listing.entries),
        # Absolute, for ranks that start elsewhere. Told anew by each run: the source may move.
        root=str(listing.root.absolute()),
        classes=listing.classes,
        containers=[str(path.absolute()) for path in listing.containers],
        rejected=[(rejected.name, rejected.reason) for rejected in listing.rejected],
        ignored=listing.ignored,
        unread=listing.unread,
    )
    # json, not pydantic's: names may hold bytes that are no UTF-8 (surrogates).
    write_whole(folder / PLAN, json.dumps(record.model_dump()).encode())


def open_plan(folder: Path) -> ShardPlan:
    """Open the plan of a partial folder. Raises DataError when it is missing or damaged."""
    record = _read(folder)
    try:
        if record is None:
            raise ValueError("no plan")
        entries, ends = map_npy(folder / _ENTRIES), map_npy(folder / _ENDS)
        if not len(entries) == len(ends) == record.samples:
            raise ValueError("lengths differ")
    except (DataError, ValueError) as error:
        raise DataError(f"{folder}: damaged plan ({error}); {_start_again(folder)}") from None
    return ShardPlan(
        settings=record.settings,
        classes=record.classes,
        root=Path(record.root),
        containers=[Path(path) for path in record.containers],
        rejected=record.rejected,
        ignored=record.ignored,
        unread=record.unread,
        entries=entries,
        _ends=ends,
        _names=folder / _NAMES,
    )


def shuffled(count: int, seed: int) -> np.ndarray:
    """The order int64 [count] in which a listing's entries become samples."""
    key = np.array([seed, 1], dtype=np.uint64)  # the reader's orders have 0 in the second word
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def check_settings(folder: Path, before: Settings, now: Settings) -> None:
    """Raise DataError when a partial folder was begun with other settings than these."""
    differences = [
        f"{name.replace('_', ' ')} {getattr(before, name)}, now {getattr(now, name)}"
        for name in Settings.model_fields
        if getattr(before, name) != getattr(now, name)
    ]
    if differences:
        raise DataError(
            f"{folder}: begun with {'; '.join(differences)}; nothing was changed: use the settings "
            f"it was begun with, or {_start_again(folder)}"
        )


def _read(folder: Path) -> _Record | None:
    try:
        text = (folder / PLAN).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{folder / PLAN}: cannot be read ({error.strerror})") from None
    try:
        return _Record.model_validate(parse_json(text, folder / PLAN))
    except (DataError, ValidationError):
        raise DataError(
            f"{folder / PLAN}: not this fastrepa's plan; {_start_again(folder)}"
        ) from None


def _start_again(folder: Path) -> str:
    return f"to start again, delete {folder}"


def _fingerprint(folder: Path, listing: Listing) -> str:
    """Hash names, places, sizes and labels; not where the source lies."""
    state = hashlib.blake2b(digest_size=16)
    bases = (listing.root.absolute(), folder.absolute())  # containers lie in the source or spool
    inside = []
    for container in (path.absolute() for path in listing.containers):
        base = next((base for base in bases if container.is_relative_to(base)), container.parent)
        inside.append(str(container.relative_to(base)))
    for texts in (
        listing.classes,
        inside,
        [f"{rejected.name}\t{rejected.reason}" for rejected in listing.rejected],
        listing.names,
    ):
        state.update(b"\0\0".join(os.fsencode(text) for text in texts))
        state.update(b"\0%d\0" % len(texts))
    state.update(np.ascontiguousarray(listing.entries).tobytes())
    return state.hexdigest()


def _what_changed(before: ShardPlan, listing: Listing) -> str:
    if before.classes != listing.classes:
        return f"{len(before.classes)} classes then, {len(listing.classes)} now, or other names"
    old = {name: key for key, name in enumerate(before.names(range(before.samples)))}
    new = {name: number for number, name in enumerate(listing.names)}
    counts = f"{len(old)} images then, {len(new)} now"
    for kind, names in (("gone", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        if names:
            return f"{counts}: {printable(min(names))} is {kind}"
    for name, number in new.items():
        if before.entries[old[name]] != listing.entries[number]:
            return f"{printable(name)} has another size, place or label"
    return f"{counts}, in another order or with other unusable ones"
