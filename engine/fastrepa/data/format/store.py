"""One sample's bytes, from the shards into a batch: what the reading threads do.

Every file is read with one `pread` a sample, and a column's row lands where the batch wants it
(`preadv`); both release the GIL. What is read is checked against its CRC-32 before anyone sees it.

B samples of the batch, C latent channels, h and w latent sides, T tokens, Z feature width.
This module imports numpy only.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastrepa.data.format.columns import CRC_BYTES, first_row
from fastrepa.data.format.index import load_index
from fastrepa.errors import DataError
from fastrepa.reading.text import is_address


@dataclass
class Slots:
    """A batch in host memory while it is being filled; sample i belongs into place i of each.

    Attributes:
        places: (shard, sample) of each.
        views: of the stored columns: 1 where the image is mirrored, else 0.
        label: int64 [B].
        encoded: an encoded image each, uint8 [bytes]; None where none is wanted.
        moments: [B,2C,h,w], or None where none is wanted.
        features: (scale fp16 [B,T], tokens int8 [B,T,Z]) of each encoder wanted.
    """

    places: list[tuple[int, int]]
    views: list[int]
    label: np.ndarray
    encoded: list[Any] | None = None
    moments: np.ndarray | None = None
    features: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


class SampleStore(Protocol):
    """The wanted fields of an opened set; any number of threads may fill and name."""

    def fill(self, slots: Slots, i: int) -> None:
        """Read sample `slots.places[i]` into place i; DataError, naming it, when it is damaged."""

    def name(self, shard: int, sample: int) -> str:
        """The sample as messages name it: its file, and its key in the file."""

    def close(self) -> None:
        """Close every file; filling again opens them again."""


class Files(Protocol):
    """Reads a store's files: `OpenFiles`, or of a set at an address `RangeFiles` (remote.py)."""

    def read(
        self, path: Path, parts: Sequence[memoryview], offset: int, named: Callable[[], str]
    ) -> bool:
        """Fill byte buffers, one after the other, from a file at `offset`; False: it is too short.

        Raises DataError, saying `named()`, where it cannot be read.
        """

    def once_more(self, path: Path, offset: int, size: int) -> bool:
        """Forget a copy of bytes that are damaged; tell whether to read them again may help."""

    def close(self) -> None:
        """Close what nobody uses."""


@dataclass(frozen=True)
class ColumnFiles:
    """A column's file of every shard, and what its rows are (columns.py)."""

    paths: Sequence[Path]
    dtype: np.dtype
    views: int


class ShardStore:
    """Reads samples of shards (shards.py).

    Args:
        images: the tar of every shard.
        indices: its index.
        image: whether the encoded image is wanted.
        moments: the latents' column, where they are wanted.
        features: the column of each encoder wanted.
        open_shards: shards whose files and index are held at a time.
    """

    def __init__(
        self,
        images: Sequence[Path],
        indices: Sequence[Path],
        *,
        image: bool,
        moments: ColumnFiles | None,
        features: Sequence[ColumnFiles],
        open_shards: int,
    ) -> None:
        self._images, self._indices = images, indices
        self._columns = (*([moments] if moments else []), *features)
        self._files = _files(images[0], open_shards * (image + len(self._columns)))
        self._open_shards = open_shards
        self._shards: OrderedDict[int, tuple[np.ndarray, list[int]]] = OrderedDict()
        self._lock = threading.Lock()

    def fill(self, slots: Slots, i: int) -> None:
        shard, sample = slots.places[i]
        records, firsts = self._shard(shard)
        record = records[sample]
        slots.label[i] = record["label"]
        if slots.encoded is not None:
            slots.encoded[i] = self._read_image(shard, record)
        rows: list[tuple[np.ndarray, ...]] = [
            (scale[i], tokens[i]) for scale, tokens in slots.features
        ]
        if slots.moments is not None:
            rows.insert(0, (slots.moments[i],))
        for column, first, parts in zip(self._columns, firsts, rows, strict=True):
            self._read_row(column, first, shard, sample, slots.views[i], parts)

    def name(self, shard: int, sample: int) -> str:
        return _named(self._images[shard], self._shard(shard)[0][sample])

    def close(self) -> None:
        self._files.close()

    def _read_image(self, shard: int, record: Any) -> np.ndarray:
        path, size = self._images[shard], int(record["image_size"])
        data = np.empty(size, dtype=np.uint8)
        offset = int(record["image_offset"])
        if not self._files.read(path, [data.data], offset, lambda: _named(path, record)):
            raise DataError(f"{_named(path, record)}: the shard ends inside it (truncated)")
        if zlib.crc32(data.data) != record["image_crc32"]:
            if self._files.once_more(path, offset, size):
                return self._read_image(shard, record)
            raise DataError(f"{_named(path, record)}: damaged (its CRC-32 is not the index's)")
        return data

    def _read_row(
        self,
        files: ColumnFiles,
        first: int,
        shard: int,
        sample: int,
        view: int,
        parts: tuple[np.ndarray, ...],
    ) -> None:
        """Scatter a row's parts to where they belong."""
        path = files.paths[shard]

        def named() -> str:
            which = f", view {view}" if view else ""
            return f"{_named(path, self._shard(shard)[0][sample])} (row {sample}{which})"

        stored = bytearray(CRC_BYTES)
        offset = first + (sample * files.views + view) * files.dtype.itemsize
        raw = [part.reshape(-1).view(np.uint8).data for part in parts]
        if not self._files.read(path, [*raw, memoryview(stored)], offset, named):
            raise DataError(f"{named()}: the column ends inside it (truncated)")
        crc = 0
        for part in raw:
            crc = zlib.crc32(part, crc)
        if crc != int.from_bytes(stored, "little"):
            if self._files.once_more(path, offset, files.dtype.itemsize):
                return self._read_row(files, first, shard, sample, view, parts)
            raise DataError(f"{named()}: damaged (its CRC-32 is wrong)")

    def _shard(self, shard: int) -> tuple[np.ndarray, list[int]]:
        """The shard's index, and the offset of the first row in each of its column files."""
        with self._lock:
            held = self._shards.get(shard)
            if held is not None:
                return held
            records = load_index(self._indices[shard])
            firsts = []
            for column in self._columns:
                path = column.paths[shard]
                firsts.append(first_row(path, column.dtype, len(records), column.views))
            self._shards[shard] = held = records, firsts
            while len(self._shards) > self._open_shards:
                self._shards.popitem(last=False)
            return held


class OpenFiles:
    """Read-only descriptors shared by threads; the least recently used ones are closed.

    At most `limit` are open, besides those in use at the moment.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # [descriptor, users]

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def use(self, path: Path, named: Callable[[], str]) -> Iterator[int]:
        """A descriptor of `path`; DataError, saying `named()`, when it cannot be opened or read."""
        with self._lock:
            entry = self._open.get(path)
            if entry is not None:
                entry[1] += 1
                self._open.move_to_end(path)
        try:
            if entry is None:
                entry = self._add(path)  # outside the lock: on a network it may take a while
            try:
                yield entry[0]
            finally:
                with self._lock:
                    entry[1] -= 1
                    self._close_some(self.limit)
        except OSError as error:
            raise DataError(f"{named()}: cannot be read ({error.strerror})") from None

    def read(
        self, path: Path, parts: Sequence[memoryview], offset: int, named: Callable[[], str]
    ) -> bool:
        with self.use(path, named) as descriptor:
            return read_exactly(descriptor, parts, offset)

    def once_more(self, path: Path, offset: int, size: int) -> bool:
        return False

    def close(self) -> None:
        """Close all that nobody uses."""
        with self._lock:
            self._close_some(0)

    def _add(self, path: Path) -> list[int]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = [descriptor, 0]
            else:  # another thread was first
                os.close(descriptor)
            entry[1] += 1
        return entry

    def _close_some(self, limit: int) -> None:
        if len(self._open) <= limit:
            return
        for path in [path for path, entry in self._open.items() if not entry[1]]:
            if len(self._open) <= limit:
                return
            os.close(self._open.pop(path)[0])


def read_exactly(descriptor: int, parts: Sequence[memoryview], offset: int) -> bool:
    """Fill byte buffers, one after the other, from a file at `offset`; False when it is too short.

    One system call, unless the file system answers in pieces.
    """
    wanted = sum(len(part) for part in parts)
    done = os.preadv(descriptor, parts, offset)
    while done < wanted:
        rest, skip = [], done
        for part in parts:
            if skip < len(part):
                rest.append(part[skip:])
            skip = max(0, skip - len(part))
        more = os.preadv(descriptor, rest, offset + done)
        if not more:
            return False
        done += more
    return True


def _files(path: Path, limit: int) -> Files:
    """Choose what reads a set of which `path` is a file."""
    if not is_address(path):
        return OpenFiles(limit)
    from fastrepa.data.format.remote import RangeFiles

    return RangeFiles()


def _named(path: Path, record: Any) -> str:
    return f"{path}: sample {record['key'].decode()}"
