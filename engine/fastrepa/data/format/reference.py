"""The reference's data layout (REPA_SPEC.md), read as it is.

    images/00000/img00000000.png             8-bit RGB
    vae-sd/00000/img-mean-std-00000000.npy   float32 [2C,h,w], cat[mean, std]
    vae-sd/dataset.json                      {"labels": [["00000/img-mean-std-00000000.npy", 12]]}

An image, its latents and its label belong together by folder and number, never by position. The
sub-folders are the set's shards. There are no checksums: names and sizes are checked at opening,
an array's header and its values when it is read, an image when it is decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from fastrepa.data.format.shards import FeaturesColumn, MomentsColumn
from fastrepa.data.format.store import Slots, read_exactly
from fastrepa.errors import DataError
from fastrepa.runtime.progress import Bar

IMAGES, LATENTS, LABELS = "images", "vae-sd", "dataset.json"

_IMAGE = re.compile(r"img(\d+)\.png")
_MOMENTS = re.compile(r"img-mean-std-(\d+)\.npy")
_LABELLED = re.compile(r"([^/\\]+)/img-mean-std-(\d+)\.npy")
_STAT_THREADS = 16  # on a network file system, asking takes longer than answering
_SHOWN = 3  # names in a message


class Pair(NamedTuple):
    """One sample: where its image and its moments lie, and its label."""

    image: Path
    moments: Path
    label: int


class _Header(NamedTuple):
    """The header of a .npy of moments: its bytes, and the array's shape."""

    raw: bytes
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Folder:
    """One sub-folder: its name, and the number (as text) and label of every sample, in order."""

    name: str
    numbers: np.ndarray  # S: digits
    labels: np.ndarray  # int32


class _Found(NamedTuple):
    """What lies in a sub-folder, by number; `odd`: latents of another size, `strange`: the rest."""

    images: set[str]
    moments: set[str]
    odd: list[str]
    strange: list[str]


class ReferenceSet:
    """A set in the reference's layout, opened and checked; see `open`."""

    features: tuple[FeaturesColumn, ...] = ()  # the layout has none

    def __init__(
        self, path: Path, resolution: int, header: _Header, folders: Sequence[_Folder]
    ) -> None:
        self.path, self.resolution, self._header = path, resolution, header
        self._folders = list(folders)
        self.shard_sizes = [len(folder.labels) for folder in self._folders]
        self.num_samples = sum(self.shard_sizes)
        count = 1 + max(int(folder.labels.max()) for folder in self._folders)
        self.classes = [str(label) for label in range(count)]  # their names are not stored

    @classmethod
    def open(
        cls, path: str | Path, *, resolution: int | None = None, progress: bool = False
    ) -> ReferenceSet:
        """Open folder `path`. Every label must have its image and its latents, and they a label.

        Raises DataError with the number and first names of missing, unlabelled and misshapen
        files; and when the first image is not of the `resolution` (pixels a side) asked for.
        """
        folder = Path(path)
        labels = _read_labels(folder / LATENTS / LABELS)
        first_folder = next(iter(labels))
        first = f"{first_folder}/{{}}{next(iter(labels[first_folder]))}{{}}"
        header = _read_header(folder / LATENTS / first.format("img-mean-std-", ".npy"))
        size = len(header.raw) + 4 * int(np.prod(header.shape))
        _check_files(folder, labels, size, progress)
        side = _image_side(folder / IMAGES / first.format("img", ".png"))
        if resolution is not None and side != resolution:
            raise DataError(
                f"{folder}: images of {side} px, but {resolution} px is asked for; "
                f"set data.resolution={side} or prepare it again"
            )
        folders = [_folder(name, labels[name]) for name in sorted(labels)]
        return cls(folder, side, header, folders)

    @property
    def moments(self) -> MomentsColumn:
        """What is known of the latents; they are fp32 here."""
        channels, side, _ = self._header.shape
        return MomentsColumn(
            views=1, precision="fp32", weights="unknown", digest=None, files=(),
            channels=channels // 2, side=side,
        )  # fmt: skip

    def pair(self, shard: int, sample: int) -> Pair:
        """The files and the label of a sample of sub-folder number `shard`."""
        folder = self._folders[shard]
        number = folder.numbers[sample].decode()
        return Pair(
            self.path / IMAGES / folder.name / f"img{number}.png",
            self.path / LATENTS / folder.name / f"img-mean-std-{number}.npy",
            int(folder.labels[sample]),
        )

    def store(
        self, *, image: bool, moments: bool, features: Sequence[str], open_shards: int
    ) -> ReferenceStore:
        """A reader of the wanted fields (store.py). No file stays open."""
        if features:
            raise KeyError(features[0])
        return ReferenceStore(self, self._header, moments=moments)


class ReferenceStore:
    """Reads samples of the reference's layout, a file for each field."""

    def __init__(self, data: ReferenceSet, header: _Header, *, moments: bool) -> None:
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


def moments_of(image: str) -> str:
    """Path of an image's moments below the set's folder, given the image's; ValueError for others.

    "images/00000/img00000000.png" -> "vae-sd/00000/img-mean-std-00000000.npy"
    """
    top, folder, name = image.split("/")
    match = _IMAGE.fullmatch(name)
    if top != IMAGES or match is None:
        raise ValueError(f"{image}: not {IMAGES}/FOLDER/imgNUMBER.png")
    return f"{LATENTS}/{folder}/img-mean-std-{match[1]}.npy"


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


def _read_moments(path: Path, header: _Header, into: np.ndarray) -> None:
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
        into[...] = np.load(path, allow_pickle=False)
    elif not whole:
        raise DataError(f"{path}: truncated")
    if not np.isfinite(into).all():
        raise DataError(f"{path}: moments that are not finite")


def _read_header(path: Path) -> _Header:
    """The header of a float32 [2C,s,s] .npy; DataError for anything else."""
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
            end = file.tell()
            file.seek(0)
            raw = file.read(end)
    except FileNotFoundError:
        raise DataError(f"{path}: missing, but {LATENTS}/{LABELS} lists it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: not a .npy file ({error})") from None
    square = len(shape) == 3 and shape[0] % 2 == 0 and shape[0] > 0 and shape[1] == shape[2] > 0
    if dtype != np.dtype("<f4") or fortran or not square:
        raise DataError(
            f"{path}: {dtype} {list(shape)}{' in Fortran order' if fortran else ''}; "
            "moments are float32 [2 * channels, side, side]"
        )
    return _Header(raw, tuple(shape))


def _image_side(path: Path) -> int:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise DataError(f"{path}: not a readable image ({error})") from None
    if width != height:
        raise DataError(f"{path}: {width}x{height} pixels, not a square")
    return width


# Opening --------------------------------------------------------------------------------------


def _read_labels(path: Path) -> dict[str, dict[str, int]]:
    """Sub-folder -> number -> label."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    except (KeyError, TypeError):
        entries = None
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path}: has no list "labels" with entries')
    labels: dict[str, dict[str, int]] = {}
    for number, entry in enumerate(entries):
        file, label = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        match = _LABELLED.fullmatch(file) if isinstance(file, str) else None
        if match is None or match[1] in (".", ".."):
            raise DataError(
                f"{path}: labels[{number}] is {_short(entry)}, "
                'not ["FOLDER/img-mean-std-NUMBER.npy", label]'
            )
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31:
            raise DataError(
                f"{path}: labels[{number}]: the label of {file} is {_short(label)}, "
                "not a whole number from 0 on"
            )
        if match[2] in labels.setdefault(match[1], {}):
            raise DataError(f"{path}: labels[{number}]: {file} is listed twice")
        labels[match[1]][match[2]] = label
    return labels


def _check_files(
    folder: Path, labels: dict[str, dict[str, int]], size: int, progress: bool
) -> None:
    """DataError unless images, latents and labels are the same samples, and latents of `size`."""
    names = sorted(labels.keys() | set(_folders(folder / IMAGES)) | set(_folders(folder / LATENTS)))
    problems: dict[str, list[str]] = {}

    def note(problem: str, files: Iterator[str]) -> None:
        if found := list(files):
            problems.setdefault(problem, []).extend(found)

    with (
        ThreadPoolExecutor(_STAT_THREADS) as pool,
        Bar("opening", len(names), "folders", shown=progress, stays=True) as bar,
    ):
        found = pool.map(lambda name: _look(folder, name, size), names)
        for name, there in zip(names, found, strict=True):
            bar.advance()
            wanted = labels.get(name, {}).keys()
            image, latent = (
                f"{IMAGES}/{name}/img{{}}.png",
                f"{LATENTS}/{name}/img-mean-std-{{}}.npy",
            )
            note("labelled, but missing", map(image.format, sorted(wanted - there.images)))
            note("labelled, but missing", map(latent.format, sorted(wanted - there.moments)))
            note(f"no label in {LABELS}", map(image.format, sorted(there.images - wanted)))
            note(f"no label in {LABELS}", map(latent.format, sorted(there.moments - wanted)))
            note("empty, or latents of another size than the first", iter(there.odd))
            note("not of this layout", iter(there.strange))
    if problems:
        raise DataError(
            f"{folder}: "
            + "; ".join(
                f"{len(files)} file{'s' * (len(files) > 1)} {problem} ({', '.join(files[:_SHOWN])}"
                f"{', ...' * (len(files) > _SHOWN)})"
                for problem, files in problems.items()
            )
        )


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _look(folder: Path, name: str, size: int) -> _Found:
    """What lies in one sub-folder of images/ and vae-sd/."""
    found = _Found(set(), set(), [], [])
    for part, pattern, numbers in (
        (IMAGES, _IMAGE, found.images),
        (LATENTS, _MOMENTS, found.moments),
    ):
        try:
            entries = list(os.scandir(folder / part / name))
        except FileNotFoundError:
            continue  # its samples are missing
        except OSError as error:
            raise DataError(f"{folder / part / name}: cannot be read ({error.strerror})") from None
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match is None:
                if entry.name[0] != ".":
                    found.strange.append(f"{part}/{name}/{entry.name}")
                continue
            try:
                bytes_ = entry.stat().st_size
            except OSError:  # a link to nowhere: missing
                continue
            if bytes_ == 0 or (part == LATENTS and bytes_ != size):
                found.odd.append(f"{part}/{name}/{entry.name}")
            numbers.add(match[1])
    return found


def _folder(name: str, labels: dict[str, int]) -> _Folder:
    numbers = sorted(labels)
    return _Folder(
        name,
        np.array([number.encode() for number in numbers]),
        np.array([labels[number] for number in numbers], dtype=np.int32),
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
