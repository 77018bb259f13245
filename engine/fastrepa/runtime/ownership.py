"""One writer at a time for every output folder: an advisory lock that its owner's death releases.

The lock is flock's on `.lock` in the folder, which says who holds it. On NFS the kernel makes it a
lock of the server's; a file system without locks (ENOLCK, ENOTSUP) leaves what the file says: the
owner's process on the same host, and a warning for any other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fastrepa.errors import FastrepaError, print_warning
from fastrepa.runtime.files import HOST, alive, sweep

LOCK = ".lock"
_SIGNED = re.compile(r".{1,80} on (?P<host>[\w.-]+), process (?P<pid>[0-9]{1,9}), since [\w:+-]+")
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def owned(
    folder: Path,
    command: str,
    kind: type[FastrepaError] = FastrepaError,
    *,
    wait: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing, for this process alone; `command` is what
    others are told of it. What killed processes left half written in it is removed.

    wait: where another process holds the folder, tell this who does, once, and wait for its end;
    without it that is an error.

    Raises an error of that kind for a folder that another process holds or that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take(folder / LOCK)
        while lock is None:
            whose = f"{folder}: in use by {_owner(folder / LOCK)}"
            if wait is None:
                raise kind(whose)
            wait(whose)
            wait = _say_nothing
            time.sleep(0.5)
            lock = _take(folder / LOCK)
    except OSError as e:
        raise kind(f"{folder}: cannot be written ({e.strerror or e})") from None
    try:
        _sign(lock, command)
        sweep(folder)
        yield
    finally:
        # While it is held: whoever opened the same file meanwhile sees that it has gone.
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)


def _take(path: Path) -> int | None:
    """Return a descriptor that holds the lock; None where another process does."""
    while True:
        # For writing: NFS grants an exclusive lock on nothing less.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, lock):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as e:
            if e.errno not in _WITHOUT_LOCKS:
                os.close(lock)
                raise
            if _signed_here_by_another(path):
                os.close(lock)
                return None
            print_warning(
                f"{path.parent}: this file system has no locks ({e.strerror}), so nothing keeps "
                "another host from writing there too"
            )
            return lock
        os.close(lock)


def _is_still(path: Path, lock: int) -> bool:
    """Tell whether the file that was locked is the one that has the name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _sign(lock: int, command: str) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{command} on {HOST}, process {os.getpid()}, since {since}".encode(), 0)


def _signature(path: Path) -> re.Match[str] | None:
    try:
        with path.open("rb") as file:
            return _SIGNED.fullmatch(file.read(500).decode(errors="replace"))
    except OSError:  # it has just gone
        return None


def _signed_here_by_another(path: Path) -> bool:
    signed = _signature(path)
    if signed is None or signed["host"] != HOST:
        return False
    return int(signed["pid"]) != os.getpid() and alive(int(signed["pid"]))


def _owner(path: Path) -> str:
    signed = _signature(path)
    return signed[0] if signed else "another process"


def _say_nothing(_: str) -> None:
    pass
