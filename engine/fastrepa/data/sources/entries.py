"""Source images as byte ranges with labels, and how the bytes of one are read.

A source, whatever it is (listing.py), becomes one flat `Listing`. Worker processes read single
entries by path and range alone, so this module imports numpy and the standard library only.
"""

from __future__ import annotations

import os
import stat
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np

from fastrepa.errors import DataError, printable

MAX_IMAGE_BYTES = 512 << 20  # of one image as it is stored, and as it is inflated
MAX_LABEL = 999_999  # more classes than this are a mistake, or an attack
_OPEN_FILES = 64  # containers that a process keeps open

# container: -1: names[i] is a file of its own below `root` (offset 0; size -1: not known);
#     otherwise the place in `containers` of the file that holds the bytes.
# inflated: -1: the bytes are the image; otherwise they are raw deflate (zip) of this many bytes.
ENTRY_DTYPE = np.dtype(
    [
        ("container", "<i4"),
        ("offset", "<i8"),  # of the first byte in the container
        ("size", "<i8"),  # bytes in the container
        ("inflated", "<i8"),
        ("label", "<i4"),  # class index, 0 .. classes-1
    ]
)


@dataclass(frozen=True)
class Rejected:
    """A picture of the source that cannot be used: its printable name, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """A source's entries. The order is the source's own, the same at every call."""

    root: Path  # the source
    classes: list[str]  # the place in the list is the label
    containers: list[Path]
    entries: np.ndarray  # [n] of ENTRY_DTYPE
    names: list[str]  # [n] for people, unique: f"{root}/{name}" says where the entry comes from
    rejected: list[Rejected] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # files that are no pictures by their names
    unread: list[str] = field(default_factory=list)  # of those: pictures by their first bytes
    moments: list[str] | None = None  # [n] reference layout: the .npy of each, relative to root


def read_entry(listing: Listing, number: int) -> bytes:
    """The bytes of one entry. Raises what `read_file` and `read_range` raise."""
    entry = listing.entries[number]
    container = int(entry["container"])
    if container < 0:
        return read_file(listing.root / listing.names[number])
    offset, size, inflated = (int(entry[name]) for name in ("offset", "size", "inflated"))
    return read_range(listing.containers[container], offset, size, inflated)


def read_file(path: str | Path) -> bytes:
    """All bytes of a regular file.

    Raises OSError as the system does, and DataError for pipes, devices and files of more than
    MAX_IMAGE_BYTES.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise DataError(printable(f"{path}: not a regular file"))
    with FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DataError(printable(f"{path}: not a regular file"))
        if status.st_size > MAX_IMAGE_BYTES:
            raise DataError(printable(f"{path}: {status.st_size} bytes; {_LIMIT}"))
        return _pread(file, str(path), 0, status.st_size)


def read_range(path: str | Path, offset: int, size: int, inflated: int = -1) -> bytes:
    """Read `size` bytes at `offset` of a file; inflated >= 0: raw deflate of just so many bytes.

    The process keeps the last files open; threads may share it. Raises OSError as the system
    does, and DataError for a range beyond the end, more than MAX_IMAGE_BYTES, or a stream that is
    damaged or longer than it says.
    """
    where = f"{path}: {size} bytes at {offset}"
    if offset < 0 or size < 0:
        raise DataError(printable(f"{where}: no range of a file"))
    if max(size, inflated) > MAX_IMAGE_BYTES:
        raise DataError(printable(f"{where} ({max(size, inflated)} inflated): {_LIMIT}"))
    data = _pread(_opened(str(path)), str(path), offset, size)
    if inflated < 0:
        return data
    stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        # One byte more than promised, and never two: a bomb stays in its box.
        image = stream.decompress(data, inflated + 1)
    except zlib.error:
        raise DataError(printable(f"{where}: damaged deflate stream")) from None
    if len(image) != inflated or not stream.eof:
        raise DataError(printable(f"{where}: does not inflate to the {inflated} bytes it promises"))
    return image


def close_files() -> None:
    """Let go of the containers that this process keeps open: they may have been replaced."""
    with _lock:
        _files.clear()


_LIMIT = f"an image may have {MAX_IMAGE_BYTES} bytes"
_files: OrderedDict[str, FileIO] = OrderedDict()
_lock = threading.Lock()


def _opened(path: str) -> FileIO:
    """The open file of a path. One that is dropped closes when its last user lets go of it."""
    with _lock:
        file = _files.get(path)
        if file is None:
            file = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(printable(f"{path}: not a regular file"))
            _files[path] = file
        _files.move_to_end(path)
        while len(_files) > _OPEN_FILES:
            _files.popitem(last=False)
        return file


def _pread(file: FileIO, path: str, offset: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(file.fileno(), size, offset)  # Linux gives at most 2 GiB, nfs often less
        if not part:
            raise DataError(printable(f"{path}: ends {size} bytes too early (at {offset})"))
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
