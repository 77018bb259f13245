"""Copies that are made once, because their source cannot be read at random: `spool/00000.tar`.

Beside each lies `00000.json`, written when the copy is complete and on the disk: what it was made
of. A later run that finds both, with the same source, takes them as they are.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

from fastrepa.data.sources.tars import BLOCK, is_header
from fastrepa.errors import DataError, printable
from fastrepa.reading.text import read_json
from fastrepa.runtime.files import aside, fsync, sweep, write_whole
from fastrepa.runtime.progress import BYTES, Bar

# Images hardly shrink: an archive that grows more than this, beyond the first part, is a bomb.
MAX_EXPANSION = 200
FREE_EXPANSION = 256 << 20  # bytes that any archive may expand to
SPARE = 1 << 30  # bytes that stay free on the disk
_CHUNK = 1 << 20

COMPRESSIONS = ("gzip", "bzip2", "xz")


@contextmanager
def byte_bar(text: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes; gives the function that takes how many are done."""
    with Bar(printable(text), total, BYTES, shown=shown) as bar:
        yield lambda done: bar.move(min(done, total))


def identity(path: Path, **settings: Any) -> dict[str, Any]:
    """Return what a copy depends on: its source's name, size and time of change, and settings."""
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, **settings}


def finished(copy: Path, source: dict[str, Any]) -> dict[str, Any] | None:
    """Return what was noted about a complete copy of this very source; None where there is none."""
    try:
        note = read_json(copy.with_suffix(".json"))
        if note["source"] == source and copy.stat().st_size == note["bytes"]:
            return dict(note)
    except (OSError, DataError, KeyError, TypeError):
        pass
    return None


@contextmanager
def new_copy(copy: Path, source: dict[str, Any]) -> Iterator[tuple[IO[bytes], dict[str, Any]]]:
    """A file to write a copy into, and a dict for what is to be noted about it.

    It gets its name when it is whole and on the disk; on failure nothing stays.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    sweep(copy.parent)  # a killed run's rest may be as large as the source
    copy.with_suffix(".json").unlink(missing_ok=True)
    note: dict[str, Any] = {}
    try:
        with aside(copy) as partial, partial.open("wb") as file:
            yield file, note
            fsync(file)
            size = file.tell()
        note |= {"source": source, "bytes": size}
        write_whole(copy.with_suffix(".json"), json.dumps(note).encode())
    except OSError as error:
        text = f"{copy.parent}: cannot be written ({error.strerror or error})"
        raise DataError(printable(text)) from None


def check_room(folder: Path, label: str) -> None:
    """Raise DataError when the disk of a folder is all but full."""
    free = shutil.disk_usage(folder).free
    if free < SPARE:
        raise DataError(
            printable(f"{label}: only {free >> 20} MiB are free for its copy in {folder}; ")
            + f"{SPARE >> 20} MiB must stay free"
        )


def decompressed(path: Path, compression: str, label: str, copy: Path, progress: bool) -> Path:
    """The tar inside a compressed file, as the file `copy`, made unless it is there already.

    Raises DataError for damaged and truncated archives, for what is no tar, for a suspicious
    expansion, and for a full disk.
    """
    source = identity(path)
    if finished(copy, source):
        return copy
    with (
        FileIO(path) as raw,
        byte_bar(f"decompressing {path.name}", source["bytes"], progress) as report,
        new_copy(copy, source) as (file, _),
    ):
        for chunk in _chunks(_stream(raw, compression), label, compression):
            if not file.tell() and not is_header(chunk[:BLOCK]):
                raise DataError(printable(f"{label}: not a tar archive, though {compression}"))
            file.write(chunk)
            if file.tell() > max(FREE_EXPANSION, MAX_EXPANSION * source["bytes"]):
                raise DataError(
                    printable(f"{label}: expands to more than {MAX_EXPANSION} times its ")
                    + f"{source['bytes']} bytes; no archive of images does"
                )
            check_room(copy.parent, label)
            report(raw.tell())
    return copy


def _stream(file: FileIO, compression: str) -> IO[bytes] | gzip.GzipFile:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    return bz2.BZ2File(file) if compression == "bzip2" else lzma.LZMAFile(file)


def _chunks(stream: IO[bytes] | gzip.GzipFile, label: str, compression: str) -> Iterator[bytes]:
    """The stream in chunks; DataError where it is damaged."""
    while True:
        try:
            chunk = stream.read(_CHUNK)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            what = "truncated" if isinstance(error, EOFError) else "damaged"
            text = f"{label}: {what} {compression} stream ({error})"
            raise DataError(printable(text)) from None
        if not chunk:
            return
        yield chunk
