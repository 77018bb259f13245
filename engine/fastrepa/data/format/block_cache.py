"""A folder of blocks of files that lie elsewhere, shared by processes, never larger than it may be.

    FOLDER/.used        bytes of all blocks, what is being written included
    FOLDER/.lock-NN     held by who fetches a block whose key falls into NN, so that others wait
    FOLDER/KEY-NUMBER   a block, there whole or not at all

The oldest by last use go first. One that is being read while it goes is read to its end (the system
keeps what is open), and one that is gone is fetched again. What cannot be written is a warning, and
from then on nothing is kept.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastrepa.errors import print_warning, worded
from fastrepa.runtime.files import aside, sweep

_BLOCK = re.compile(r"[0-9a-f]{32}-\d+")
_STRIPES = 64
_KEPT = 0.9  # of the limit, when room was made


class BlockCache:
    """Blocks in `folder`, of at most `limit` bytes together; any threads and processes use it."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._on = limit > 0
        self._threads = [threading.Lock() for _ in range(_STRIPES)]
        if self._on:
            with self._or_off():
                folder.mkdir(parents=True, exist_ok=True)
                sweep(folder)
                with self._locked(".lock"):
                    self._write_used(sum(size for _, size, _ in self._blocks()))

    @property
    def keeps(self) -> bool:
        """Tell whether blocks are kept: until something cannot be written."""
        return self._on

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """Return bytes of a block, fewer where it is shorter; None: it is not here."""
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            with suppress(OSError):  # its last use; a folder of others may be read-only
                os.utime(descriptor)
            return os.pread(descriptor, size, offset)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def fetch(
        self, name: str, offset: int, size: int, length: int, get: Callable[[], bytes]
    ) -> bytes:
        """Return bytes of a block of `length` that is not here; `get` brings all of it, once for
        all who wait.
        """
        stripe = int(name[:8], 16) % _STRIPES
        with self._threads[stripe], self._locked(f".lock-{stripe:02d}"):
            found = self.read(name, offset, size)  # another was first
            if found is not None:
                return found
            whole = get()
            if len(whole) == length:
                self._keep(name, whole)
            return whole[offset : offset + size]

    def drop(self, name: str) -> bool:
        """Remove a block; tell whether it was here."""
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True

    def _keep(self, name: str, whole: bytes) -> None:
        if not self._on or len(whole) > self.limit:
            return
        with self._or_off():
            self._reserve(len(whole))
            # Not flushed to the disk: a block that a power cut tore is found by its samples' CRC.
            with aside(self.folder / name) as partial:
                partial.write_bytes(whole)

    def _reserve(self, size: int) -> None:
        """Count `size` bytes more, after room was made for them."""
        with self._locked(".lock"):
            try:
                used = int((self.folder / ".used").read_text())
            except (OSError, ValueError):
                used = sum(size for _, size, _ in self._blocks())
            if used + size > self.limit:
                used = self._make_room(size)
            self._write_used(used + size)

    def _make_room(self, size: int) -> int:
        """Remove the blocks that were used longest ago; return the bytes of those that stay."""
        blocks = sorted(self._blocks())
        used = sum(each for _, each, _ in blocks)
        for _, each, path in blocks:
            if used + size <= max(size, _KEPT * self.limit):
                break
            with suppress(FileNotFoundError):
                path.unlink()
            used -= each
        return used

    def _blocks(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of every block; files of others are none of ours."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _BLOCK.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found

    def _write_used(self, used: int) -> None:
        (self.folder / ".used").write_text(str(used))

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock among processes, where the file system has such; else two may do the same."""
        descriptor = -1
        if self._on:
            with suppress(OSError):
                path = self.folder / name
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @contextmanager
    def _or_off(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._on:
                self._on = False
                print_warning(
                    f"{self.folder}: blocks cannot be kept there ({worded(error)}); "
                    "reading goes on without (data.cache_dir, data.cache_gb)"
                )
