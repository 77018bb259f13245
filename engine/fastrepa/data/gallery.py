"""A data set as something to look at: any sample's image, latents and tokens, by its number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrepa.data.datasets import DataSet, open_data
from fastrepa.data.format.index import load_index
from fastrepa.data.format.reference import ReferenceSet
from fastrepa.data.format.shards import FeaturesColumn, MomentsColumn, ShardSet
from fastrepa.data.format.store import SampleStore, Slots
from fastrepa.data.images import UnreadableImageError, decode_rgb
from fastrepa.errors import DataError
from fastrepa.runtime.terminal import counted

_STREAM = 3  # of the draw; the reader's orders and prepare's shuffle have others


class Gallery:
    """The N samples of a set of either layout, numbered 0 .. N-1; read as training reads them.

    labels: int64 [N]; classes: names, or numbers where it has none; encoders: its feature columns;
    moments: what is known of its latents, or None; data: the set itself. Reading raises DataError,
    naming the sample.
    """

    def __init__(self, path: Path) -> None:
        """Open the data set in folder `path`; DataError where it is none or files do not fit."""
        self.data = data = open_data(path, verify="sizes")
        self.path, self.resolution, self.classes = path, data.resolution, data.classes
        self.moments, self.encoders = data.moments, data.features
        self.labels = _labels(data)
        self._ends = np.cumsum(data.shard_sizes)
        self._stores: dict[str, SampleStore] = {}

    def key(self, number: int) -> str:
        """Return the set's name for a sample."""
        place = self._place(number)
        if isinstance(self.data, ReferenceSet):
            image = self.data.pair(*place).image
            return f"{image.parent.name}/{image.stem}"
        return self._store("image").name(*place).rpartition(" ")[2]

    def image(self, number: int) -> np.ndarray:
        """Read an image: uint8 [R,R,3]."""
        encoded: list[Any] = [None]
        self._fill("image", number, encoded=encoded)
        try:
            # `data verify` names what a decoder repairs in shards; training sees it as it is.
            repaired = isinstance(self.data, ShardSet)
            return np.array(decode_rgb(encoded[0].tobytes(), repaired=repaired))
        except UnreadableImageError as error:
            name = self._store("image").name(*self._place(number))
            raise DataError(f"{name}: cannot be decoded ({error})") from None

    def latent_mean(self, number: int) -> np.ndarray:
        """Read a latent's mean: float32 [C,h,w]; only where the set has moments."""
        column = self.moments
        assert column is not None
        kind = np.float16 if column.files else np.float32  # in the reference's layout
        moments = np.empty((1, 2 * column.channels, column.side, column.side), dtype=kind)
        self._fill("moments", number, moments=moments)
        return moments[0, : column.channels].astype(np.float32)

    def tokens(self, encoder: FeaturesColumn, number: int) -> np.ndarray:
        """Read an image's tokens: float32 [T,Z]."""
        scale = np.empty((1, encoder.grid**2), dtype=np.float16)
        tokens = np.empty((*scale.shape, encoder.width), dtype=np.int8)
        self._fill(encoder.name, number, features=((scale, tokens),))
        return tokens[0].astype(np.float32) * scale[0].astype(np.float32)[:, None]

    def summary(self) -> list[tuple[str, str]]:
        """Properties of the set, in words."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        without = f", {(counts == 0).sum():,} without any" if not counts.all() else ""
        shards, samples = len(self.data.shard_sizes), len(self.labels)
        if isinstance(self.data, ShardSet):
            manifest = self.data.manifest
            quality = f", quality {manifest.quality}" if manifest.quality is not None else ""
            where, layout = "shard", f"{manifest.image_format}{quality}, in tar shards"
            size = [("bytes", _size(sum(shard.bytes for shard in manifest.shards), samples))]
            if manifest.skipped:
                size.append(("left out", f"{len(manifest.skipped):,} sources"))
        else:
            where, layout = "folder", "png, in the reference's layout"
            size = [("bytes", _size(_bytes_below(self.path), samples))]
        rows = [
            ("set", str(self.path)),
            ("images", f"{samples:,} in {counted(shards, where)}"),
            (
                "classes",
                f"{len(counts):,}, of {counts.min():,} to {counts.max():,} images{without}",
            ),
            ("resolution", f"{self.resolution} px"),
            ("format", layout),
            *size,
        ]
        columns = (*((self.moments,) if self.moments else ()), *self.encoders)
        return rows + [(column.name, _described(column, samples)) for column in columns]

    def _fill(self, field: str, number: int, **slots: Any) -> None:
        place = self._place(number)
        label = np.empty(1, dtype=np.int64)
        self._store(field).fill(Slots(places=[place], views=[0], label=label, **slots), 0)

    def _store(self, field: str) -> SampleStore:
        if field not in self._stores:
            encoder = field.removeprefix("features.")
            self._stores[field] = self.data.store(
                image=field == "image",
                moments=field == "moments",
                features=[encoder] if encoder != field else [],
                open_shards=1,
            )
        return self._stores[field]

    def _place(self, number: int) -> tuple[int, int]:
        """The shard of a sample, and its place there."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, int(number - self._ends[shard] + self.data.shard_sizes[shard])


def choose(
    labels: np.ndarray, num: int, seed: int, allowed: Sequence[int] | None = None
) -> np.ndarray:
    """Choose up to `num` places in `labels` [N], a seeded draw that takes the classes in turn.

    No class has two more than another that still has images left. The first k of a draw are the
    draw of k.
    """
    key = np.array([seed % 2**64, _STREAM], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(len(labels) + int(labels.max()) + 1)
    draws, turns = draws[: len(labels)], draws[len(labels) :]
    places = np.arange(len(labels))
    if allowed is not None:
        places = places[np.isin(labels, allowed)]
    # Sorted by class and draw, an image's rank in its class is its place less its class's first.
    places = places[np.lexsort((draws[places], labels[places]))]
    of = labels[places]
    rank = np.arange(len(places)) - np.searchsorted(of, of)
    return places[np.lexsort((turns[of], rank))][:num]


def _labels(data: DataSet) -> np.ndarray:
    if isinstance(data, ShardSet):
        parts = [load_index(path)["label"] for path in data.index_paths]
    else:
        assert isinstance(data, ReferenceSet)
        parts = [folder.labels for folder in data._folders]
    return np.concatenate(parts).astype(np.int64)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(num_bytes: int, samples: int) -> str:
    """Decimal units, and bytes an image."""
    value, units = float(num_bytes), ["TB", "GB", "MB", "kB", "B"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop()
    digits = 0 if units[-1] == "B" else 1
    return f"{value:.{digits}f} {units[-1]}, {num_bytes / samples:,.0f} B an image"


def _described(column: MomentsColumn | FeaturesColumn, samples: int) -> str:
    made = f"made in {column.precision} with {column.weights}" if column.files else "fp32"
    views = "1 view" if column.views == 1 else f"{column.views} views (mirrored, too)"
    words = [made, views]
    if isinstance(column, MomentsColumn):
        kind = "fp16 " if column.files else ""
        words.insert(0, f"{kind}[{2 * column.channels}, {column.side}, {column.side}]")
    else:
        shape = f"int8 [{column.grid**2}, {column.width}]"
        words.insert(0, f"{column.timm_name} at {column.input_side} px, {shape}")
        words.insert(2, f"min cosine {column.min_cosine:.5f}")
    if column.files:
        words.append(_size(sum(record.bytes for record in column.files), samples))
    return ", ".join(words)
