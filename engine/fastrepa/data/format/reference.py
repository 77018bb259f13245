"""A data set in the reference's layout (reference_layout.py), opened and read as it is.

The sub-folders are the set's shards. There are no checksums: names and sizes are checked at
opening, an array's header and its values when it is read, an image when it is decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrepa.data.format.reference_layout import (
    IMAGES,
    LABELS,
    LATENTS,
    Scan,
    name_of,
    read_labels,
    scan_folder,
    short,
)
from fastrepa.data.format.shards import FeaturesColumn, MomentsColumn
from fastrepa.data.format.store import Slots, read_exactly
from fastrepa.errors import DataError
from fastrepa.reading.arrays import NpyHeader, read_header, read_npy
from fastrepa.runtime.progress import Bar

_STAT_THREADS = 16  # on a network file system, asking takes longer than answering
_SHOWN = 3  # names in a message


class Pair(NamedTuple):
    """One sample: where its image and its moments lie, and its label."""

    image: Path
    moments: Path
    label: int


@dataclass(frozen=True)
class _Folder:
    """One sub-folder: its name, and the number (as text) and label of every sample, in order."""

    name: str
    numbers: np.ndarray  # S: digits
    labels: np.ndarray  # int32


class ReferenceSet:
    """A set in the reference's layout, opened and checked; see `open`."""

    features: tuple[FeaturesColumn, ...] = ()  # the layout has none

    def __init__(
        self, path: Path, resolution: int, header: NpyHeader, folders: Sequence[_Folder]
    ) -> None:
        self.path, self.resolution, self._header = path, resolution, header
        self._folders = list(folders)
        self.shard_sizes = [len(folder.labels) for folder in self._folders]
        self.num_samples = sum(self.shard_sizes)
        count = 1 + max(int(folder.labels.max()) for folder in self._folders)
        self.classes = [str(label) for label in range(count)]  # their names are not stored
        counts = sum(np.bincount(folder.labels, minlength=count) for folder in self._folders)
        self.class_sizes: list[int] = np.asarray(counts).tolist()

    @classmethod
    def open(
        cls, path: str | Path, *, resolution: int | None = None, progress: bool = False
    ) -> ReferenceSet:
        """Open folder `path`. Every label must have its image and its latents, and they a label.

        Raises DataError with the number and first names of missing, unlabelled and misshapen
        files; and when the first image is not of the `resolution` (pixels a side) asked for.
        """
        folder = Path(path)
        labels = _labels(folder)
        first_folder = next(iter(labels))
        first = first_folder, next(iter(labels[first_folder]))
        header = _read_header(folder / name_of(LATENTS, first))
        size = len(header.raw) + 4 * int(np.prod(header.shape))
        _check_files(folder, labels, size, progress)
        side = _image_side(folder / name_of(IMAGES, first))
        if resolution is not None and side != resolution:
            raise DataError(
                f"{folder}: images of {side} px, but {resolution} px is asked for; "
                f"set data.resolution={side} or prepare it again"
            )
        folders = [_folder(name, labels[name]) for name in sorted(labels)]
        return cls(folder, side, header, folders)

    @property
    def digest(self) -> str:
        """SHA-256 of the samples' names and labels, in their order."""
        sha = hashlib.sha256()
        for folder in self._folders:
            sha.update(json.dumps([folder.name, len(folder.labels)]).encode())
            sha.update(folder.numbers.tobytes() + folder.labels.tobytes())
        return sha.hexdigest()

    @property
    def moments(self) -> MomentsColumn:
        """The latents' column; they are fp32 here."""
        channels, side, _ = self._header.shape
        return MomentsColumn(
            views=1, precision="fp32", weights="unknown", digest=None, files=(),
            channels=channels // 2, side=side,
        )  # fmt: skip

    def pair(self, shard: int, sample: int) -> Pair:
        """The files and the label of a sample of sub-folder number `shard`."""
        folder = self._folders[shard]
        key = folder.name, folder.numbers[sample].decode()
        image, moments = (self.path / name_of(part, key) for part in (IMAGES, LATENTS))
        return Pair(image, moments, int(folder.labels[sample]))

    def store(
        self, *, image: bool, moments: bool, features: Sequence[str], open_shards: int
    ) -> ReferenceStore:
        """A reader of the wanted fields (store.py). No file stays open."""
        if features:
            raise KeyError(features[0])
        return ReferenceStore(self, self._header, moments=moments)


class ReferenceStore:
    """Reads samples of the reference's layout, a file for each field."""

    def __init__(self, data: ReferenceSet, header: NpyHeader, *, moments: bool) -> None:
        self._data, self._header, self._moments = data, header, moments

    def fill(self, slots: Slots, i: int) -> None:
        pair = self._data.pair(*slots.places[i])
        slots.label[i] = pair.label
        if slots.encoded is not None:
            slots.encoded[i] = _read_file(pair.image)
        if self._moments:
            assert slots.moments is not None
            _read_moments(pair.moments, self._header, slots.moments[i])

    def name(self, shard: int, sample: int) -> str:
        return str(self._data.pair(shard, sample).image)

    def close(self) -> None:
        return


def read_moments(path: Path) -> np.ndarray:
    """The moments of one image, float32 [2C,h,w]; DataError, naming it, for any other file."""
    header = _read_header(path)
    moments = np.empty(header.shape, dtype=np.float32)
    _read_moments(path, header, moments)
    return moments


# Reading --------------------------------------------------------------------------------------


def _read_file(path: Path) -> np.ndarray:
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not len(data):
        raise DataError(f"{path}: empty")
    return data


def _read_moments(path: Path, header: NpyHeader, into: np.ndarray) -> None:
    """Fill `into`, float32 [2C,h,w], from a .npy of exactly that."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = bytearray(len(header.raw))
            parts = [memoryview(raw), into.reshape(-1).view(np.uint8).data]
            whole = read_exactly(descriptor, parts, 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if raw != header.raw:  # written by another program, perhaps: then it may still be right
        found = _read_header(path)
        if found.shape != header.shape:
            raise DataError(f"{path}: of shape {list(found.shape)}, not {list(header.shape)}")
        into[...] = read_npy(path)
    elif not whole:
        raise DataError(f"{path}: truncated")
    if not np.isfinite(into).all():
        raise DataError(f"{path}: moments that are not finite")


def _read_header(path: Path) -> NpyHeader:
    """The header of a float32 [2C,s,s] .npy; DataError for anything else."""
    missing = f"missing, but {LATENTS}/{LABELS} lists it"
    header = read_header(path, "a .npy file", missing=missing)
    shape, fortran, dtype, _ = header
    square = len(shape) == 3 and shape[0] % 2 == 0 and shape[0] > 0 and shape[1] == shape[2] > 0
    if dtype != np.dtype("<f4") or fortran or not square:
        raise DataError(
            f"{path}: {dtype} {list(shape)}{' in Fortran order' if fortran else ''}; "
            "moments are float32 [2 * channels, side, side]"
        )
    return header


def _image_side(path: Path) -> int:
    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(start) < 24 or not start.startswith(b"\x89PNG\r\n\x1a\n"):
        raise DataError(f"{path}: not a readable image (no PNG)")
    width, height = struct.unpack(">II", start[16:])  # the first chunk is the header
    if width != height:
        raise DataError(f"{path}: {width}x{height} pixels, not a square")
    return width


# Opening --------------------------------------------------------------------------------------


def _labels(folder: Path) -> dict[str, dict[str, int]]:
    """Sub-folder -> number -> label; DataError at the first entry that is not sound."""
    path = folder / LATENTS / LABELS
    labels: dict[str, dict[str, int]] = {}
    for entry in read_labels(folder):
        if entry.key is None or not entry.key[0]:
            raise DataError(f"{path}: {entry.misnamed}")
        if entry.label is None or entry.label >= 2**31:
            raise DataError(
                f"{path}: labels[{entry.number}]: the label of {entry.file} is "
                f"{short(entry.entry[1])}, not a whole number from 0 on"
            )
        numbers, number = labels.setdefault(entry.key[0], {}), entry.key[1]
        if number in numbers:
            raise DataError(f"{path}: labels[{entry.number}]: {entry.file} is listed twice")
        numbers[number] = entry.label
    return labels


def _check_files(
    folder: Path, labels: dict[str, dict[str, int]], size: int, progress: bool
) -> None:
    """DataError unless images, latents and labels are the same samples, and latents of `size`."""
    parts = (IMAGES, LATENTS)
    present = {part: set(scan_folder(folder, part).folders) for part in parts}
    names = sorted(labels.keys() | present[IMAGES] | present[LATENTS])
    problems: dict[str, list[str]] = {}

    def look(name: str) -> list[tuple[str, Scan]]:
        nothing = Scan({}, [], [], [])
        return [
            (part, scan_folder(folder, part, name) if name in present[part] else nothing)
            for part in parts
        ]

    def note(problem: str, part: str, name: str, numbers: Iterable[str]) -> None:
        if files := [name_of(part, (name, number)) for number in sorted(numbers)]:
            problems.setdefault(problem, []).extend(files)

    with (
        ThreadPoolExecutor(_STAT_THREADS) as pool,
        Bar("opening", len(names), "folders", shown=progress, stays=True) as bar,
    ):
        found = pool.map(look, names)
        for name, halves in zip(names, found, strict=True):
            bar.advance()
            wanted = labels.get(name, {}).keys()
            for part, scan in halves:
                note("labelled, but missing", part, name, wanted - scan.sizes.keys())
            for part, scan in halves:
                note(f"no label in {LABELS}", part, name, scan.sizes.keys() - wanted)
            for part, scan in halves:
                odd = (n for n, s in scan.sizes.items() if not s or (part == LATENTS and s != size))
                note("empty, or latents of another size than the first", part, name, odd)
                if strange := [f"{part}/{name}/{other}" for other in scan.strange + scan.folders]:
                    problems.setdefault("not of this layout", []).extend(strange)
    if problems:
        raise DataError(
            f"{folder}: "
            + "; ".join(
                f"{len(files)} file{'s' * (len(files) > 1)} {problem} ({', '.join(files[:_SHOWN])}"
                f"{', ...' * (len(files) > _SHOWN)})"
                for problem, files in problems.items()
            )
        )


def _folder(name: str, labels: dict[str, int]) -> _Folder:
    numbers = sorted(labels)
    return _Folder(
        name,
        np.array([number.encode() for number in numbers]),
        np.array([labels[number] for number in numbers], dtype=np.int32),
    )
