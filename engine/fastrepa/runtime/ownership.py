"""One writer at a time for every output folder: an advisory lock that its owner's death releases.

The lock is flock's on `.lock` in the folder, which says who holds it. On NFS the kernel makes it a
lock of the server's; mounts whose locks are each host's own protect within the host. A file system
without locks (ENOLCK, ENOTSUP) leaves what the file says: the owner's process on the same host, and
a warning for any other. A forked child does not hold what its parent does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fastrepa.errors import FastrepaError, print_warning, worded
from fastrepa.runtime.files import HOST, alive, cut, sweep
from fastrepa.runtime.world import World, of_rank_0

LOCK = ".lock"
_SIGNED = re.compile(r".{1,80} on (?P<host>[\w.-]+), process (?P<pid>[0-9]{1,9}), since [\w:+-]+")
_BEGUN = b"fastrepa "  # every command's
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[int] = set()


class InUse(FastrepaError):
    """A folder that another process holds; says which."""


@contextmanager
def owned(
    folder: Path,
    command: str,
    kind: type[FastrepaError] = FastrepaError,
    *,
    wait: Callable[[str], None] | None = None,
    file: str = "",
) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing, for this process alone; `command` is what
    others are told of it. What killed processes left half written in it is removed.

    wait: where another process holds the folder, tell this who does, once, and wait for its end;
    without it that is an error. file: the name of the one file or folder in it that is held, rather
    than all of it.

    Raises an error of that kind for a folder that another process holds or that cannot be written.
    """
    release = None
    while release is None:
        try:
            release = take(folder, command, file)
        except InUse as e:
            if wait is None:
                raise kind(str(e)) from None
            wait(str(e))
            wait = _say_nothing
            time.sleep(0.5)
        except OSError as e:
            raise kind(f"{e.filename or folder}: cannot be written ({worded(e)})") from None
    try:
        yield
    finally:
        release()


@contextmanager
def owned_by_rank_0(
    folder: Path, command: str, world: World, kind: type[FastrepaError] = FastrepaError
) -> Iterator[None]:
    """As `owned`, by the first rank for all; its error is raised on all alike (collective)."""
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(owned(folder, command, kind))

        of_rank_0(world, hold)
        yield


def take(folder: Path, command: str, file: str = "") -> Callable[[], None]:
    """Begin to hold `folder` as `owned` does; returns what ends it, which raises nothing.

    Raises InUse where another process holds it, OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f".{cut(file)}.lock" if file else LOCK)
    descriptor = _locked(path)
    if descriptor is None:
        raise InUse(f"{folder / file}: in use by {_owner(path)}")
    _held.add(descriptor)

    def release() -> None:
        if descriptor not in _held:  # a fork's, whose parent goes on
            return
        _held.remove(descriptor)
        try:
            # While it is held: whoever opened the same file meanwhile sees that it has gone.
            if _is_still(path, descriptor):
                path.unlink()
        except OSError:  # of a killed process it stays as well
            pass
        finally:
            os.close(descriptor)

    try:
        _sign(descriptor, command)
        sweep(folder)
    except BaseException:
        release()
        raise
    return release


def holder(folder: Path) -> str:
    """Say who holds `folder`, as far as it can be seen without touching it; "" where nobody does.

    The lock itself is not tried: whoever begins at that moment would find it taken.
    """
    path = folder / LOCK
    signed = _signature(path)
    if not signed or (signed["host"] == HOST and not alive(int(signed["pid"]))):
        return ""
    return signed[0]


def _let_go_in_fork() -> None:
    """The child of a killed owner would keep its lock for as long as it lives."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_fork)


def _locked(path: Path) -> int | None:
    """Return a descriptor that holds the lock; None where another process does."""
    while True:
        # For writing: NFS grants an exclusive lock on nothing less.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        lock = os.open(path, flags, 0o666)
        try:
            if _is_foreign(lock):
                raise FileExistsError(errno.EEXIST, "in the way, and not fastrepa's", str(path))
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
            signed = _signature(path)
            if signed and signed["host"] == HOST and _is_another(int(signed["pid"])):
                os.close(lock)
                return None
            before = f"; the last to do so was {signed[0]}" if signed else ""
            print_warning(
                f"{path.parent}: this file system has no locks ({worded(e)}), so nothing keeps "
                f"another host from writing there too{before}"
            )
            return lock
        os.close(lock)


def _is_another(pid: int) -> bool:
    return pid != os.getpid() and alive(pid)


def _is_still(path: Path, lock: int) -> bool:
    """Tell whether the file that was locked is the one that has the name."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _is_foreign(lock: int) -> bool:
    """Tell whether a lock's file holds anything that no owner wrote there."""
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        return True
    said = os.pread(lock, 500, 0).rstrip(b"\0")  # which a power cut leaves
    begun = said[: len(_BEGUN)] == _BEGUN[: len(said)]  # and a kill, in the middle of it
    return not (begun or _SIGNED.fullmatch(said.decode(errors="replace")))


def _sign(lock: int, command: str) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"{command} on {HOST}, process {os.getpid()}, since {since}".encode()
    os.ftruncate(lock, 0)
    if os.pwrite(lock, text, 0) < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _signature(path: Path) -> re.Match[str] | None:
    try:
        with path.open("rb") as file:
            return _SIGNED.fullmatch(file.read(500).decode(errors="replace"))
    except OSError:  # it has just gone
        return None


def _owner(path: Path) -> str:
    signed = _signature(path)
    return signed[0] if signed else "another process"


def _say_nothing(_: str) -> None:
    pass
