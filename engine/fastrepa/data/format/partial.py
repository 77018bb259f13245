"""The folder `.OUT.partial` in which a set is made, so that OUT is there whole or not at all.

It stays when the work is interrupted, for the next run to go on. Two locks in it: `.lock` belongs
to the run; `.writers` is shared by its other processes, which may outlive a killed one for a moment
and must not write beside their successors.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastrepa.data.format.shards import MANIFEST, SOURCES
from fastrepa.errors import DataError, worded
from fastrepa.runtime import ownership

PLAN = "plan.json"
SPOOL = "spool"  # what the source's reader unpacks or notes down
REPORT = "report.json"
CONTACT_SHEET = "contact_sheet.png"  # of sets that older versions made
_WRITERS = ".writers"
_NAMES = (MANIFEST, SOURCES, SPOOL, REPORT, CONTACT_SHEET, ownership.LOCK, _WRITERS)
_OURS = re.compile(
    r"\.?shard-\d+\..+|plan\..+|\..+\.tmp|"
    + "|".join(
        map(re.escape, (MANIFEST, SOURCES, SPOOL, REPORT, CONTACT_SHEET, ownership.LOCK, _WRITERS))
    )
)
_GRACE = 60.0  # seconds that processes of a killed run have to end


def partial_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@contextmanager
def owned(out: Path) -> Iterator[Path]:
    """Make or take over the partial folder of `out`, held by this process alone.

    Left-over temporary files are removed. A folder that got no plan is removed at the end.
    Raises DataError when a live run holds it, or it has files that are none of ours.
    """
    folder = partial_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(name for name in os.listdir(folder) if not _OURS.fullmatch(name))
    except OSError as error:
        raise DataError(f"{out}: cannot be written there ({worded(error)})") from None
    if foreign:
        raise DataError(f"{folder}: in the way; it holds {foreign[0]}, which is none of ours")
    with ownership.owned(folder, "fastrepa prepare", DataError):
        _await_writers(folder)
        for place in (folder, folder / SPOOL):  # of whatever host: all its writers have gone
            for stale in place.glob(".*.tmp"):
                stale.unlink()
        try:
            yield folder
        finally:
            if folder.is_dir() and not any((folder / name).exists() for name in (PLAN, MANIFEST)):
                shutil.rmtree(folder, ignore_errors=True)


def join_writers(folder: Path) -> None:
    """Join those that write into the folder: in every further process, before its first file."""
    # Never closed: the lock ends with the process.
    fcntl.flock(_open(folder / _WRITERS), fcntl.LOCK_SH)


def release(folder: Path) -> None:
    """Remove everything that is not part of a finished set; the plan goes last."""
    shutil.rmtree(folder / SPOOL, ignore_errors=True)
    for path in folder.glob("shard-*.done.json"):
        path.unlink()
    for path in sorted(folder.glob("plan.*"), key=lambda path: path.name == PLAN):
        path.unlink()
    for name in (_WRITERS, ownership.LOCK):
        (folder / name).unlink(missing_ok=True)


def _await_writers(folder: Path) -> None:
    writers, deadline = _open(folder / _WRITERS), time.monotonic() + _GRACE
    try:
        while True:
            try:
                fcntl.flock(writers, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{folder}: processes of an earlier run still write here; end them"
                    ) from None
                time.sleep(0.05)
    finally:
        os.close(writers)


def _open(path: Path) -> int:
    # For writing: NFS grants an exclusive lock on nothing less.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
