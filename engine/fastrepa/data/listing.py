"""The images of a class-folder tree: which files, in which classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastrepa.data.images import readable_extensions
from fastrepa.errors import DataError


@dataclass(frozen=True)
class Listing:
    """What a source folder holds; paths are relative to it, in sorted order."""

    classes: list[str]  # names of the top-level folders; the place in the list is the label
    files: list[str]
    labels: list[int]  # of each file
    ignored: list[str]  # visible files that are no images by their names, or lie in no class


def list_images(source: Path) -> Listing:
    """List a tree SOURCE/CLASS/.../IMAGE. Hidden files and folders are passed over.

    Raises DataError when there are no class folders, or one holds no image.
    """
    extensions = readable_extensions()
    folders, strays = _entries(source, "")
    if not folders:
        raise DataError(f"{source}: holds no class folders (expected {source}/CLASS/IMAGE)")
    listing = Listing(folders, [], [], strays)
    for label, name in enumerate(folders):
        before = len(listing.files)
        for file in _walk(source, name, frozenset({os.path.realpath(source)})):
            if os.path.splitext(file)[1].lower() in extensions:
                listing.files.append(file)
                listing.labels.append(label)
            else:
                listing.ignored.append(file)
        if len(listing.files) == before:
            text = f"{source / name}: class folder without images; remove or fill it"
            raise DataError(printable(text))
    return listing


def printable(text: str) -> str:
    """A name on one line in any encoding: control characters and stray bytes become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _walk(source: Path, folder: str, above: frozenset[str]) -> Iterator[str]:
    """Files anywhere below source/folder. Links are followed, except back to a folder above."""
    real = os.path.realpath(source / folder)
    if real in above:
        return
    folders, files = _entries(source, folder)
    yield from (f"{folder}/{name}" for name in files)
    for name in folders:
        yield from _walk(source, f"{folder}/{name}", above | {real})


def _entries(source: Path, folder: str) -> tuple[list[str], list[str]]:
    """Sorted names of the visible folders and of the other visible entries."""
    try:
        with os.scandir(source / folder) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
    except OSError as error:
        text = f"{source / folder}: cannot be read ({error.strerror})"
        raise DataError(printable(text)) from None
    folders = {entry.name for entry in entries if os.path.isdir(entry.path)}
    return sorted(folders), sorted(entry.name for entry in entries if entry.name not in folders)
