"""The reference's data layout by its names (REPA_SPEC.md): the one scanner of files and labels.

    images/00000/img00000000.png             8-bit RGB
    vae-sd/00000/img-mean-std-00000000.npy   float32 [2C,h,w], cat[mean, std]
    vae-sd/dataset.json                      {"labels": [["00000/img-mean-std-00000000.npy", 12]]}

An image, its latents and its label belong together by folder and number, never by position. What
to do with a sample that is not complete is for the caller: opening a set refuses it (reference.py),
preparing rejects it by name (reference_source.py), verifying lists it (check_reference.py).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastrepa.errors import DataError
from fastrepa.reading.text import read_json

IMAGES, LATENTS, LABELS = "images", "vae-sd", "dataset.json"

Key = tuple[str, str]
"""A sample: its folder, "" where there is none, and the digits of its number."""

_PATTERNS = {IMAGES: re.compile(r"img(\d+)\.png"), LATENTS: re.compile(r"img-mean-std-(\d+)\.npy")}
_LABELLED = re.compile(r"(?:([^/\\]+)/)?img-mean-std-(\d+)\.npy")
_SHORT = 60  # characters of a value in a message


class Scan(NamedTuple):
    """One folder of `images/` or `vae-sd/` as it lies there, in order; hidden names apart."""

    sizes: dict[str, int]  # bytes of every file of the layout, by its digits
    folders: list[str]
    strange: list[str]  # files of other names
    hidden: list[str]


class Labelled(NamedTuple):
    """One entry of the list of labels, sound or not."""

    number: int  # its place in the list
    entry: Any
    file: str | None  # as written; None: the entry is no pair of a text and something
    key: Key | None  # None: the file's name is not of the layout
    label: int | None  # None: no whole number from 0 on

    @property
    def misnamed(self) -> str:
        """Words for an entry without a key."""
        return (
            f"labels[{self.number}] is {short(self.entry)}, "
            'not ["FOLDER/img-mean-std-NUMBER.npy", label]'
        )


def is_reference(folder: Path) -> bool:
    """Return whether a folder is laid out as the reference's, complete or not."""
    return (folder / IMAGES).is_dir() and (folder / LATENTS / LABELS).is_file()


def name_of(part: str, key: Key) -> str:
    """Return the path, below the set, of a sample's file in `part`, IMAGES or LATENTS."""
    name = f"img{key[1]}.png" if part == IMAGES else f"img-mean-std-{key[1]}.npy"
    return "/".join(filter(None, (part, key[0], name)))


def moments_of(image: str) -> str:
    """Return the path of an image's moments below the set, given the image's; else ValueError.

    "images/00000/img00000000.png" -> "vae-sd/00000/img-mean-std-00000000.npy"
    """
    top, folder, name = image.split("/")
    match = _PATTERNS[IMAGES].fullmatch(name)
    if top != IMAGES or match is None:
        raise ValueError(f"{image}: not {IMAGES}/FOLDER/imgNUMBER.png")
    return name_of(LATENTS, (folder, match[1]))


def scan_folder(root: Path, part: str, folder: str = "") -> Scan:
    """List `root/part/folder`. A link to nowhere is not there; DataError for no readable folder."""
    found = Scan({}, [], [], [])
    try:
        with os.scandir(root / part / folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        place = root / part / folder
        raise DataError(f"{place}: cannot be read ({error.strerror})") from None
    for entry in listed:
        match = _PATTERNS[part].fullmatch(entry.name)
        if entry.name.startswith("."):
            found.hidden.append(entry.name)
        elif match is None:
            (found.folders if entry.is_dir() else found.strange).append(entry.name)
        else:
            try:
                status = entry.stat()
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode):
                found.folders.append(entry.name)
            else:
                found.sizes[match[1]] = status.st_size
    return found


def read_labels(folder: Path) -> Iterator[Labelled]:
    """Yield every entry of a set's list of labels; DataError where there is no such list."""
    path = folder / LATENTS / LABELS
    try:
        entries = read_json(path)["labels"]
    except (KeyError, TypeError):
        entries = None
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path}: has no list "labels" with entries')
    for number, entry in enumerate(entries):
        file, label = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        file = file if isinstance(file, str) else None
        match = _LABELLED.fullmatch(file) if file else None
        key = (match[1] or "", match[2]) if match and match[1] not in (".", "..") else None
        sound = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        yield Labelled(number, entry, file, key, label if sound else None)


def short(value: Any) -> str:
    """Return a value of a JSON file as a message shows it."""
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."
