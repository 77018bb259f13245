"""A few hundred images of a data set to look at: of a prepared set, or a plain folder of pictures.

A folder of pictures needs no preparing here: CLASS/.../IMAGE, or images alone, which have no
labels. They are cropped and resized as `fastrepa prepare` would (images.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrepa.data.classes import written_form
from fastrepa.data.datasets import is_data
from fastrepa.data.gallery import Gallery, choose
from fastrepa.data.images import UnreadableImageError, load_square
from fastrepa.data.sources.entries import read_entry, read_file
from fastrepa.data.sources.listing import list_source
from fastrepa.data.sources.members import picture_extensions
from fastrepa.errors import ConfigError, DataError, printable

FOLDER_RESOLUTION = 256  # of a plain folder's images, unless said otherwise
LEAST_OF_CLASS = 10  # images, for a class to be told from others
WANTED_OF_CLASS = 20

Progress = Callable[[float], None]


@dataclass(frozen=True)
class ImageSample:
    """Some images uint8 [N,3,R,R] and their labels.

    labels: int64 [N], 0 .. C-1 of `classes`, or None, with the reason in `no_labels`.
    names: what the set calls each. said: what was left out, in words.
    """

    images: Tensor
    labels: np.ndarray | None
    classes: list[str]
    names: list[str]
    no_labels: str
    said: list[str]

    @property
    def resolution(self) -> int:
        return self.images.shape[-1]


def draw_sample(
    path: Path,
    num: int,
    *,
    seed: int = 0,
    resolution: int | None = None,
    progress: Progress | None = None,
) -> ImageSample:
    """Read up to `num` images of the set or folder at `path`, by classes in turn and by seed.

    Where there are more classes than leave WANTED_OF_CLASS images to each, some are drawn; classes
    of fewer than LEAST_OF_CLASS images are passed over, unless that leaves no two. `resolution`:
    of a plain folder; a prepared set has its own. `progress` is told the share read.

    Raises DataError where there is no image, ConfigError for another resolution than the set's.
    """
    progress = progress or (lambda _: None)
    if is_data(path):
        gallery = Gallery(path)
        if resolution not in (None, gallery.resolution):
            raise ConfigError(
                f"--resolution: {resolution}, but {path} was prepared at {gallery.resolution} px; "
                f"leave it out"
            )
        allowed, said = choose_classes_of(gallery.labels, num, seed)
        places = choose(gallery.labels, num, seed, allowed)
        images = read_images(gallery, places, progress)
        names = [gallery.key(int(place)) for place in places]
        return _sample(images, gallery.labels[places], gallery.classes, names, allowed, said)
    return _of_folder(path, num, seed, resolution or FOLDER_RESOLUTION, progress)


def read_images(gallery: Gallery, places: np.ndarray, progress: Progress) -> Tensor:
    """Read the samples with these numbers: uint8 [N,3,R,R]."""
    side = gallery.resolution
    images = np.empty((len(places), side, side, 3), dtype=np.uint8)
    for row, place in enumerate(places):
        images[row] = gallery.image(int(place))
        progress((row + 1) / len(places))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def choose_classes_of(
    labels: np.ndarray, num: int, seed: int
) -> tuple[list[int] | None, list[str]]:
    """Return (classes to draw `num` images from, None where no two can be told apart; words)."""
    counts = np.bincount(labels)
    present, enough = np.flatnonzero(counts), np.flatnonzero(counts >= LEAST_OF_CLASS)
    if len(enough) < 2:
        return None, []
    said = []
    if len(enough) < len(present):
        said.append(f"classes of fewer than {LEAST_OF_CLASS} images left out: "
                    f"{len(present) - len(enough)} of {len(present)}")  # fmt: skip
    most = max(2, num // WANTED_OF_CLASS)
    if len(enough) > most:
        draw = np.random.Philox(key=np.array([seed % 2**64, 1], dtype=np.uint64))
        enough = np.sort(enough[np.argsort(draw.random_raw(len(enough)))[:most]])
        said.append(f"{most} of {len(present)} classes drawn, so that each has images enough")
    return [int(c) for c in enough], said


def _sample(
    images: Tensor,
    labels: np.ndarray,
    classes: list[str],
    names: list[str],
    allowed: list[int] | None,
    said: list[str],
) -> ImageSample:
    """Make the sample, with labels numbered anew, 0 .. C-1, or without any."""
    if allowed is None:
        why = (
            f"no two classes of at least {LEAST_OF_CLASS} images"
            if len(classes) > 1
            else "all images are of one class"
        )
        return ImageSample(images, None, [], names, why, said)
    place = np.searchsorted(allowed, labels)
    kept = [written_form(classes[c]) for c in allowed]
    return ImageSample(images, place, kept, names, "", said)


def _of_folder(path: Path, num: int, seed: int, resolution: int, progress: Progress) -> ImageSample:
    flat = [] if has_folders(path) else flat_images(path)
    if flat:
        labels, classes, allowed, said = np.zeros(len(flat), dtype=np.int64), [], None, list[str]()
    else:
        with tempfile.TemporaryDirectory() as spool:
            listing = list_source(path, spool=Path(spool), progress=False)
        labels, classes = listing.entries["label"].astype(np.int64), listing.classes
        if not len(labels):
            raise DataError(f"{path}: holds no images")
        allowed, said = choose_classes_of(labels, num, seed)
    pictures, kept, names, bad = [], [], [], []
    places = choose(labels, num, seed, allowed)
    for row, place in enumerate(places):
        name = printable(flat[place].name if flat else listing.names[place])
        try:
            data = read_file(flat[place]) if flat else read_entry(listing, int(place))
            pictures.append(np.asarray(load_square(data, resolution)))
            kept.append(place)
            names.append(name)
        except (UnreadableImageError, OSError) as error:
            bad.append(f"{name} ({error})")
        progress((row + 1) / len(places))
    if not pictures:
        raise DataError(f"{path}: no image can be read, the first is {bad[0]}")
    if bad:
        said.append(f"images that cannot be read left out: {len(bad)}, the first {bad[0]}")
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    if flat:
        why = "the folder holds images, not folders of classes"
        return ImageSample(images, None, [], names, why, said)
    return _sample(images, labels[kept], classes, names, allowed, said)


def has_folders(path: Path) -> bool:
    """Tell whether there is a visible folder in it: a class."""
    return any(p.is_dir() for p in path.iterdir() if not p.name.startswith("."))


def flat_images(path: Path) -> list[Path]:
    """The images that lie in folder `path` itself, sorted; empty where there is none."""
    extensions = picture_extensions()
    found = (p for p in path.iterdir() if p.suffix.lower() in extensions)
    return sorted(p for p in found if not p.name.startswith("."))
