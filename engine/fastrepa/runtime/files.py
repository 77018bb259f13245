"""Files that are there whole or not at all: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

HOST = re.sub(r"[^\w.-]", "-", socket.gethostname())[:64]
_TEMPORARY = re.compile(r"\..+\.(?P<pid>[0-9]{1,9})@(?P<host>[\w.-]+)\.tmp")
_ABANDONED = 86400.0  # seconds for which what another host left has not changed


def temporary(path: Path, by: str = "") -> Path:
    """The name beside `path`, of this process alone, until it is whole: .NAME.PID@HOST.tmp; `by`
    is another one's `process_name`.
    """
    return path.with_name(f".{cut(path.name)}.{by or process_name()}.tmp")


def process_name() -> str:
    """PID@HOST, of this process."""
    return f"{os.getpid()}@{HOST}"


def cut(name: str) -> str:
    """As much of a file's name as leaves room for more: a name that fits must not fail by that."""
    return os.fsdecode(os.fsencode(name)[:150])


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that processes left in `folder` which are no more."""
    for path in folder.glob(".*.tmp"):
        by = _TEMPORARY.fullmatch(path.name)
        if by and not _may_go_on(path, by["host"], int(by["pid"])):
            remove(path)


def is_temporary(path: Path) -> bool:
    """Tell whether `temporary` makes such names."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _may_go_on(path: Path, host: str, pid: int) -> bool:
    """Tell whether the process that a temporary name has may still write there."""
    if host == HOST:
        return alive(pid)
    try:
        return time.time() - path.stat().st_mtime < _ABANDONED
    except OSError:
        return True


def alive(pid: int) -> bool:
    """Tell whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def remove(path: Path) -> None:
    """Remove a temporary file or folder, as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or a folder to, which then takes its name.

    Where the block fails nothing stays.
    """
    partial = temporary(path)
    try:
        yield partial
        _mode_by_umask(partial)
        partial.replace(path)
    finally:
        remove(partial)


def _mode_by_umask(path: Path) -> None:
    """Let others read what the umask lets them: safetensors writes for its owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in [path, *path.rglob("*")]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file so that it is there whole, whatever happens, power cuts included."""
    with aside(path) as partial, partial.open("wb") as file:
        file.write(data)
        fsync(file)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write or replace a .npy as `write_whole` does."""
    import numpy as np  # not for the sake of a configuration

    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, buffer.getvalue())


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add a line of JSON for each record, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        fsync(file)


def fsync(file: IO[Any]) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class NewFile:
    """A file that is hashed as it is written, and gets its name when it is on the disk.

    Left as a context before it is finished, it goes. num_bytes: written so far. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, temporary(path)
        self._file = self._partial.open("wb")
        self._sha, self.num_bytes = hashlib.sha256(), 0

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def write(self, data: Any) -> int:
        """Append bytes, or what has their buffer."""
        self._sha.update(data)
        written = self._file.write(data)
        self.num_bytes += written
        return written

    def tell(self) -> int:
        return self.num_bytes

    def finish(self) -> str:
        """Give it its name; returns the SHA-256 of what was written."""
        fsync(self._file)
        self._file.close()
        self._partial.replace(self._path)
        return self._sha.hexdigest()

    def drop(self) -> None:
        """Give it up, unless it is finished."""
        try:
            self._file.close()
        finally:  # a full disk, where closing fails again, gets its room back
            self._partial.unlink(missing_ok=True)
