"""A data set as something to look at: any sample's image, latents and tokens, by its number.

One sample at a time, each checked by its CRC-32; training reads elsewhere (reader.py).
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from fastrepa.data.columns import first_damaged, open_rows
from fastrepa.data.index import load_index
from fastrepa.data.shards import FeaturesColumn, MomentsColumn, ShardSet
from fastrepa.errors import DataError


class Gallery(Protocol):
    """What is shown of a set of N samples, numbered 0 .. N-1. Reading raises DataError.

    labels: int64 [N]; classes: names, or numbers where it has none; encoders: its feature columns.
    """

    path: Path
    resolution: int
    classes: list[str]
    labels: np.ndarray
    has_moments: bool
    encoders: tuple[FeaturesColumn, ...]

    def key(self, number: int) -> str:
        """What the set calls a sample."""

    def image(self, number: int) -> np.ndarray:
        """uint8 [R,R,3]"""

    def latent_mean(self, number: int) -> np.ndarray:
        """float32 [C,h,w]; only where has_moments."""

    def tokens(self, encoder: FeaturesColumn, number: int) -> np.ndarray:
        """float32 [T,Z]"""

    def summary(self) -> list[tuple[str, str]]:
        """Properties of the set, in words."""


def open_gallery(path: Path) -> Gallery:
    """Open the data set in folder `path`; DataError where it is none, or its files do not fit."""
    return ShardGallery(ShardSet.open(path, verify="sizes"))


class ShardGallery:
    """A prepared set (shards.py)."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards, manifest = shards, shards.manifest
        self.path, self.resolution, self.classes = shards.path, shards.resolution, shards.classes
        self._index = np.concatenate([load_index(path) for path in shards.index_paths])
        self._ends = np.cumsum(shards.shard_sizes)
        self.labels = self._index["label"].astype(np.int64)
        self.has_moments, self.encoders = manifest.moments is not None, manifest.features

    def key(self, number: int) -> str:
        return self._index["key"][number].decode()

    def image(self, number: int) -> np.ndarray:
        shard, _ = self._place(number)
        record = self._index[number]
        path = self._shards.shard_paths[shard]
        with path.open("rb") as file:
            file.seek(int(record["image_offset"]))
            data = file.read(int(record["image_size"]))
        if zlib.crc32(data) != record["image_crc32"]:
            raise DataError(
                f"{path}: sample {self.key(number)} is damaged; see fastrepa data verify"
            )
        return decoded(data, f"{path}: sample {self.key(number)}")

    def latent_mean(self, number: int) -> np.ndarray:
        column = self._shards.manifest.moments
        assert column is not None
        return self._row(column, number)["moments"][: column.channels].astype(np.float32)

    def tokens(self, encoder: FeaturesColumn, number: int) -> np.ndarray:
        row = self._row(encoder, number)
        return row["tokens"].astype(np.float32) * row["scale"].astype(np.float32)[:, None]

    def summary(self) -> list[tuple[str, str]]:
        manifest = self._shards.manifest
        counts = sorted(record.samples for record in manifest.classes)
        quality = f", quality {manifest.quality}" if manifest.quality is not None else ""
        num_bytes = sum(shard.bytes for shard in manifest.shards)
        rows = [
            ("set", str(self.path)),
            ("images", f"{manifest.num_samples:,} in {len(manifest.shards):,} shards"),
            ("classes", f"{len(counts):,}, of {counts[0]:,} to {counts[-1]:,} images"),
            ("resolution", f"{manifest.resolution} px"),
            ("format", f"{manifest.image_format}{quality}"),
            ("bytes", size_in_words(num_bytes, manifest.num_samples)),
        ]
        if manifest.skipped:
            rows.append(("left out", f"{len(manifest.skipped):,} sources"))
        for column in manifest.columns:
            rows.append((column.name, _described(column, manifest.num_samples)))
        return rows

    def _place(self, number: int) -> tuple[int, int]:
        """The shard of a sample, and its place there."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, int(number - self._ends[shard] + self._shards.shard_sizes[shard])

    def _row(self, column: MomentsColumn | FeaturesColumn, number: int) -> np.ndarray:
        """View 0 of a sample's row."""
        shard, place = self._place(number)
        path = self.path / column.files[shard].file
        rows = open_rows(path, column.dtype, self._shards.shard_sizes[shard], column.views)
        row = np.array(rows[place : place + 1])
        if first_damaged(row) is not None:
            raise DataError(
                f"{path}: sample {self.key(number)} is damaged; see fastrepa data verify"
            )
        return row[0, 0]


def decoded(data: bytes, where: str) -> np.ndarray:
    """uint8 [H,W,3] of an encoded image; DataError naming `where`."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise DataError(f"{where}: cannot be decoded ({error})") from None


def size_in_words(num_bytes: int, samples: int) -> str:
    """Decimal units, and bytes an image."""
    value, units = float(num_bytes), ["TB", "GB", "MB", "kB", "B"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop()
    digits = 0 if units[-1] == "B" else 1
    return f"{value:.{digits}f} {units[-1]}, {num_bytes / samples:,.0f} B an image"


def _described(column: MomentsColumn | FeaturesColumn, samples: int) -> str:
    views = "1 view" if column.views == 1 else f"{column.views} views (mirrored, too)"
    size = size_in_words(sum(record.bytes for record in column.files), samples)
    if isinstance(column, MomentsColumn):
        what = f"fp16 [{2 * column.channels}, {column.side}, {column.side}]"
        return f"{what}, made in {column.precision} with {column.weights}, {views}, {size}"
    what = f"{column.timm_name} at {column.input_side} px, int8 [{column.grid**2}, {column.width}]"
    return (
        f"{what}, made in {column.precision} with {column.weights}, min cosine "
        f"{column.min_cosine:.5f}, {views}, {size}"
    )
