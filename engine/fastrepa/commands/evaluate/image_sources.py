"""The sides of `fastrepa evaluate`: images of a folder, npz, data set or run, or statistics.

A source has `num` images, numbered from 0; `labels` int64 [num] and `classes` (their names) where
it knows them; `batches(numbers)` gives, for each tensor of image numbers, its images as uint8
[B,3,H,W] or, where they differ in size, one by one; `digest()` is the data's SHA-256, None where
nothing stored is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastrepa.data.datasets import open_data
from fastrepa.data.format.reference_layout import LABELS, LATENTS
from fastrepa.data.format.shards import MANIFEST, ShardSet
from fastrepa.data.gallery import Gallery
from fastrepa.data.images import image_files, read_rgb
from fastrepa.errors import DataError
from fastrepa.generation.folder import PNG_NAME, RECORD, settings_of
from fastrepa.generation.generate import generate
from fastrepa.reading.arrays import NPZ, npz_names, npz_stream, read_npz
from fastrepa.reading.text import is_address, read_json
from fastrepa.runtime.files import sha256_of
from fastrepa.vision.codec import Codec

READERS = 8  # threads that read and decode
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's and pytorch-fid's

Gaussian = tuple[Tensor, Tensor]


class ImageSource(Protocol):
    """Images by number; labels [num] int64, where they are known."""

    @property
    def num(self) -> int: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def classes(self) -> Sequence[str]: ...
    def batches(self, numbers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield uint8 [n,3,H,W] for each of numbers [n] int64: one, or n where sizes differ."""

    def digest(self) -> str | None: ...


@dataclass(frozen=True)
class Statistics:
    """Means and covariances of Inception's features by name (`pool`, `spatial`), float64."""

    path: Path
    gaussians: Mapping[str, Gaussian]
    num: None = None


class Stills:
    """Images that are read by number: of a folder, or of a data set."""

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        num: int,
        labels: Tensor | None,
        classes: Sequence[str],
        digest: Callable[[], str],
        still: Callable[[], None] = lambda: None,
    ) -> None:
        """`read`: image number -> uint8 [H,W,3], from any thread. `still`, after the last of them,
        raises DataError where they are not those that were there before the first.
        """
        self._read, self._digest, self._still = read, functools.cache(digest), still
        self.num, self.labels, self.classes = num, labels, classes

    def digest(self) -> str:
        return self._digest()

    def batches(self, numbers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        def read(number: int) -> Tensor:
            return torch.from_numpy(self._read(number)).permute(2, 0, 1)

        with ThreadPoolExecutor(READERS) as readers:
            jobs = [[readers.submit(read, i) for i in batch.tolist()] for batch in numbers[:1]]
            for following in range(1, len(numbers) + 1):
                images = [job.result() for job in jobs.pop()]
                for batch in numbers[following : following + 1]:
                    jobs.append([readers.submit(read, i) for i in batch.tolist()])
                if len({image.shape for image in images}) == 1:
                    yield [torch.stack(images)]
                else:
                    yield [image[None] for image in images]
        self._still()


def open_folder(folder: Path) -> Stills:
    """The images below a folder in the order of their names; class folders are classes.

    Of a folder of `fastrepa sample` its numbered images alone, which it must not replace while they
    are read. Raises DataError where none are.
    """
    record = folder / RECORD
    made_by = settings_of(record)
    files = image_files(folder)
    labels, classes = None, []
    if record.is_file():
        files = [path for path in files if path.parent == folder and PNG_NAME.fullmatch(path.name)]
        classes = _classes_of(record)
        if classes:  # the images have them in turn, by their numbers: some may be gone
            labels = torch.tensor([int(path.stem) % len(classes) for path in files])
    if not files:
        raise DataError(f"{folder}: holds no images that can be read")
    parents = [path.relative_to(folder).parts[0] for path in files if path.parent != folder]
    if len(parents) == len(files):
        classes = sorted(set(parents))
        labels = torch.tensor([classes.index(parent) for parent in parents])

    def digest() -> str:
        sha = hashlib.sha256()
        with ThreadPoolExecutor(READERS) as readers:
            for path, contents in zip(files, readers.map(sha256_of, files), strict=True):
                sha.update(f"{path.relative_to(folder)} {contents}\n".encode())
        return sha.hexdigest()

    def still() -> None:
        if settings_of(record) != made_by:
            raise DataError(f"{folder}: its images were replaced while they were read")

    count = len(files)
    return Stills(lambda number: read_rgb(files[number]), count, labels, classes, digest, still)


def missing_images(folder: Path, num: int) -> list[str]:
    """Say in a line that `fastrepa sample` was to make more images there than the `num`."""
    stored = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    wanted = stored.get("num") if isinstance(stored, dict) else None
    if not isinstance(wanted, int) or wanted <= num:
        return []
    return [f"{folder}: {num:,} of the {wanted:,} images that {RECORD} speaks of are there"]


def _classes_of(record: Path) -> list[str]:
    """The classes that `fastrepa sample` drew in turn; none where it drew all, which go unnamed."""
    stored = read_json(record)
    chosen = stored.get("classes", "all") if isinstance(stored, dict) else None
    if chosen != "all" and not isinstance(chosen, list):
        raise DataError(
            f"{record}: not the record of `fastrepa sample`, whose classes are a list or all"
        )
    return [] if chosen == "all" else [str(c) for c in chosen]


def open_set(folder: Path) -> Stills:
    """A prepared set, or one in the reference's layout. Raises DataError where it is damaged."""
    gallery = Gallery(folder)

    def digest() -> str:
        data = open_data(folder, verify="sizes")
        if not isinstance(data, ShardSet):
            return open_folder(folder / "images").digest()
        contents = [(shard.file, shard.sha256) for shard in data.manifest.shards]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    labels = torch.from_numpy(gallery.labels)
    return Stills(gallery.image, len(labels), labels, gallery.classes, digest)


class AdmImages:
    """`arr_0` uint8 [N,H,W,3] of an npz (Dhariwal and Nichol 2021), read as a stream.

    gaussians: of the statistics that ADM's reference batches hold beside it, which are those of the
    whole data set and so what FID is measured against.
    """

    labels = None
    classes: Sequence[str] = ()

    def __init__(self, path: Path, gaussians: Mapping[str, Gaussian]) -> None:
        self.path, self.gaussians = path, gaussians
        self._digest = functools.cache(lambda: sha256_of(path))
        with npz_stream(path, "arr_0") as (header, _):
            self.shape, fortran, dtype, _ = header
        if fortran:
            raise DataError(f"{path}: not {NPZ} (arr_0 is in Fortran's order)")
        if len(self.shape) != 4 or self.shape[3] != 3 or dtype != np.uint8 or 0 in self.shape:
            raise DataError(f"{path}: arr_0 is {dtype} {list(self.shape)}, not uint8 [N,H,W,3]")
        self.num = self.shape[0]

    def batches(self, numbers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield uint8 [n,3,H,W] for each of numbers [n], rising: what lies between is skipped."""
        at, size = 0, int(np.prod(self.shape[1:]))
        with npz_stream(self.path, "arr_0") as (_, member):
            for batch in numbers:
                images = np.empty((len(batch), *self.shape[1:]), dtype=np.uint8)
                for image, number in zip(images, batch.tolist(), strict=True):
                    while at <= number:  # no seek: the checksum is of all that is read
                        raw, at = member.read(size), at + 1
                    if len(raw) != size:
                        raise DataError(f"{self.path}: ends inside image {number} (truncated)")
                    image[:] = np.frombuffer(raw, dtype=np.uint8).reshape(image.shape)
                yield [torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()]

    def digest(self) -> str:
        return self._digest()


def open_npz(path: Path) -> AdmImages | Statistics:
    """Images and, or, statistics of an npz; DataError for one with neither."""
    names = npz_names(path)
    stored = read_npz(path, {name for pair in STATISTICS.values() for name in pair})
    gaussians = {
        name: (_statistic(path, mu, stored[mu]), _statistic(path, sigma, stored[sigma]))
        for name, (mu, sigma) in STATISTICS.items()
        if mu in stored and sigma in stored
    }
    for mu, sigma in gaussians.values():
        if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)):
            raise DataError(f"{path}: mu {list(mu.shape)}, sigma {list(sigma.shape)} misfit")
    if "arr_0" in names:
        return AdmImages(path, gaussians)
    if not gaussians:
        raise DataError(
            f"{path}: holds {', '.join(names)[:80] or 'nothing'}; an npz has images (arr_0, uint8 "
            f"[N,H,W,3]) or statistics (mu and sigma, mu_s and sigma_s)"
        )
    return Statistics(path, gaussians)


def _statistic(path: Path, name: str, values: np.ndarray) -> Tensor:
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise DataError(f"{path}: {name} is {values.dtype}, not finite real numbers")
    return torch.from_numpy(values.astype(np.float64))


class Generated:
    """A generator's images, made when they are asked for: image i has labels[i].

    `options` are those of `generate`: seed, batch_size, sample_config, path, ...
    """

    def __init__(
        self, model: Any, codec: Codec, labels: Tensor, classes: Sequence[str], **options: Any
    ) -> None:
        self._model, self._codec, self._options = model, codec, options
        self.num, self.labels, self.classes = len(labels), labels, classes

    def batches(self, numbers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        assert self.labels is not None
        for ids in numbers:
            wanted = self.labels[ids]
            yield [generate(self._model, self._codec, wanted, sample_ids=ids, **self._options)]

    def digest(self) -> None:
        return None


def open_stored(path: Path) -> Stills | AdmImages | Statistics:
    """Open what lies at `path` and is no run; else a DataError that names what is allowed."""
    if is_address(path):
        return open_set(path)
    if path.is_file() and path.suffix == ".npz":
        return open_npz(path)
    if not path.is_dir():
        kind = "is no .npz file" if path.is_file() else "no such file or folder"
        raise DataError(
            f"{path}: {kind}; allowed are a folder of images, an npz of images or of statistics, "
            f"a prepared data set, and a run, a checkpoint of one or its export as .safetensors"
        )
    if (path / MANIFEST).is_file() or (path / LATENTS / LABELS).is_file():
        return open_set(path)
    return open_folder(path)
