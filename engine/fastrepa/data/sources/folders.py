"""A folder on the disk -> its members, as an archive has them: names below it, in sorted order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fastrepa.data.sources.members import (
    LABEL_EXTENSIONS,
    Members,
    extension_of,
    is_hidden,
    picture_extensions,
)
from fastrepa.errors import DataError, worded


def scan_folder(source: Path) -> Members:
    """Find the visible files below a folder. Raises DataError for what cannot be read."""
    members = Members(source, str(source), folders=[])
    wanted = picture_extensions() | LABEL_EXTENSIONS
    for name, size in _walk(source, "", frozenset(), members):
        if extension_of(name) in wanted:
            members.take(name, 0, size)
        else:
            members.pass_over(name, (0, size, -1))
    return members


def entries_of(source: Path, folder: str = "") -> tuple[list[str], list[tuple[str, int]]]:
    """Sorted names of the visible folders, and of the other visible entries with their sizes."""
    folders, files = [], []
    try:
        with os.scandir(source / folder) as scan:
            for entry in scan:
                if is_hidden(entry.name):
                    continue
                try:
                    if entry.is_dir():
                        folders.append(entry.name)
                    else:
                        files.append((entry.name, entry.stat().st_size))
                except OSError:  # a link to nowhere or to itself: reading it will say so
                    files.append((entry.name, -1))
    except OSError as error:
        raise DataError(f"{source / folder}: cannot be read ({worded(error)})") from None
    return sorted(folders), sorted(files)


def _walk(
    source: Path, folder: str, above: frozenset[str], members: Members
) -> Iterator[tuple[str, int]]:
    """Files anywhere below source/folder. Links are followed, except back to a folder above."""
    real = os.path.realpath(source / folder)
    if real in above:
        return
    folders, files = entries_of(source, folder)
    before = f"{folder}/" if folder else ""
    yield from ((before + name, size) for name, size in files)
    for name in folders:
        assert members.folders is not None
        members.folders.append(before + name)
        yield from _walk(source, before + name, above | {real}, members)
