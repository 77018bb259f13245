"""Data sets as the pipeline reads them, whatever their layout, and how one is recognised."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from fastrepa.config import Config, DataConfig
from fastrepa.data.format.reference_layout import LABELS, LATENTS
from fastrepa.data.format.shards import MANIFEST, FeaturesColumn, MomentsColumn, ShardSet
from fastrepa.data.format.store import SampleStore
from fastrepa.errors import DataError
from fastrepa.reading.text import is_address
from fastrepa.runtime.world import launched_world


class DataSet(Protocol):
    """An opened and checked set: `ShardSet` or `ReferenceSet`.

    A column of two views holds the mirrored images' rows too.
    """

    @property
    def path(self) -> Path: ...

    @property
    def resolution(self) -> int:
        """Side of every image in pixels."""

    @property
    def classes(self) -> list[str]:
        """Class names; the place in the list is the label."""

    @property
    def class_sizes(self) -> list[int]:
        """Samples of each class, by its number; some may have none."""

    @property
    def digest(self) -> str:
        """SHA-256 that other images, labels or another order of them would change; no column."""

    @property
    def num_samples(self) -> int: ...

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""

    @property
    def moments(self) -> MomentsColumn | None:
        """The stored latents' column; None: the set holds none."""

    @property
    def features(self) -> tuple[FeaturesColumn, ...]:
        """The column of every encoder's stored features."""

    def store(
        self, *, image: bool, moments: bool, features: Sequence[str], open_shards: int
    ) -> SampleStore:
        """A reader of the wanted fields; `features` by the encoders' names.

        `open_shards`: shards whose files are held open. KeyError for a column that is not there.
        """


def located(path: str | Path) -> Path:
    """The path that is meant: of an address one that is read as files are (remote.py)."""
    if is_address(path):
        from fastrepa.data.format.remote import remote_path

        return remote_path(path)
    return Path(path)


def keep_blocks(config: DataConfig) -> None:
    """Keep what is read from an address as the section says."""
    if is_address(config.path):
        from fastrepa.data.format.remote import use_cache

        use_cache(config.cache_dir, config.cache_gb)


def is_data(path: Path) -> bool:
    """Tell whether the folder is a data set by what it holds, sound or not."""
    if (path / MANIFEST).exists():
        return True
    return not is_address(path) and (path / LATENTS / LABELS).exists()


def open_data(
    path: str | Path,
    *,
    resolution: int | None = None,
    verify: Literal["sizes", "full", "auto"] = "auto",
) -> DataSet:
    """Open a folder of shards (shards.py), on a disk or at an address (remote.py), or one in the
    reference's layout (reference.py).

    Raises DataError, naming the file, for what is missing, truncated or foreign, and when the
    images are not of the `resolution` (pixels a side) asked for. `verify`: see `ShardSet.open`;
    the reference's layout has no checksums, and nothing but names and sizes to check.
    """
    folder = located(path)
    if (folder / MANIFEST).exists():
        return ShardSet.open(folder, resolution=resolution, verify=verify)
    if not is_address(folder) and (folder / LATENTS / LABELS).exists():
        from fastrepa.data.format.reference import ReferenceSet

        # A million files take a while to look at: say so where a person watches.
        watched = sys.stderr.isatty() and launched_world().is_rank_0
        return ReferenceSet.open(folder, resolution=resolution, progress=watched)
    if is_address(folder):
        raise DataError(f"{folder / MANIFEST}: not there, so it is no address of a prepared set")
    found = "is no data set" if folder.is_dir() else "no such folder"
    raise DataError(
        f"{folder}: {found}: neither {MANIFEST} (shards made by `fastrepa prepare`) nor "
        f"{LATENTS}/{LABELS} (the reference's layout) is there"
    )


def with_classes(config: Config) -> Config:
    """The configuration with the set's number of classes where model.num_classes is auto.

    Raises DataError where the set cannot be opened.
    """
    keep_blocks(config.data)
    if not config.model.takes_the_sets_classes:
        return config
    try:
        count = len(open_data(config.data.path, verify="sizes").classes)
    except DataError as e:
        raise DataError(f"{e}; without it model.num_classes cannot be auto") from None
    model = config.model.model_copy(update={"num_classes": count})
    return config.model_copy(update={"model": model})
