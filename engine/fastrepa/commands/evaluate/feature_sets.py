"""A set of images as features: what metrics are computed from, and what is kept of a reference.

Every rank takes whole batches in turn (`rank_batches`), so a feature does not depend on the number
of ranks. Of each feature are wanted the moments of all images, in float64, or the features
themselves, of at most KEPT images spread evenly over the set: what compares images by pairs, or
in subsets, needs no more and could not hold them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.commands.evaluate.extractors import Extractor
from fastrepa.commands.evaluate.image_sources import STATISTICS, Gaussian, ImageSource
from fastrepa.commands.evaluate.metrics import Moments
from fastrepa.errors import DataError, writing
from fastrepa.generation.generate import rank_batches
from fastrepa.reading.arrays import read_npz
from fastrepa.reading.text import is_address
from fastrepa.runtime.files import aside
from fastrepa.runtime.world import World, on_all

KEPT = 50_000
MOMENTS = ("mean", "scatter")
VERSION = 1  # of a cached file


@dataclass(frozen=True)
class Wanted:
    """Names of wanted features ("inception.pool"): those whose moments, and those that are kept."""

    moments: frozenset[str]
    kept: frozenset[str]

    @property
    def spaces(self) -> frozenset[str]:
        return frozenset(name.partition(".")[0] for name in self.moments | self.kept)

    def of(self, space: str) -> Wanted:
        mine = [
            frozenset(name for name in names if name.partition(".")[0] == space)
            for names in (self.moments, self.kept)
        ]
        return Wanted(*mine)


@dataclass
class FeatureSet:
    """Features of `num` images: moments by name; kept features fp32 [K,D] and the images [K] they
    are of. On the first rank; on the others nothing is kept.
    """

    num: int
    moments: dict[str, Moments]
    kept: dict[str, Tensor]

    @property
    def numbers(self) -> Tensor:
        return kept_numbers(self.num)


def kept_numbers(num: int) -> Tensor:
    """The images [K] int64 whose features are kept."""
    count = min(num, KEPT)
    return torch.arange(count) * num // count


def extract(
    source: ImageSource,
    extractors: Mapping[str, Extractor],
    wanted: Wanted,
    *,
    world: World,
    batch_size: int,
    progress: Callable[[int], None] = lambda images: None,
) -> FeatureSet:
    """The wanted features of a source's images (collective).

    `progress` is told how many images this rank has just taken. A FastrepaError of it, as of what
    reads the images, ends all ranks.
    """
    keep = set(kept_numbers(source.num).tolist()) if wanted.kept else set()
    moments: dict[str, Moments] = {}
    kept: dict[str, list[Tensor]] = {name: [] for name in wanted.kept}
    for space in wanted.spaces:
        for feature, width in extractors[space].widths.items():
            if (name := f"{space}.{feature}") in wanted.moments:
                moments[name] = Moments.empty(width, world.device)
    numbers = rank_batches(source.num, batch_size, world.rank, world.size)
    seen = []

    def look() -> None:
        for ids, images in zip(numbers, source.batches(numbers), strict=True):
            chosen = torch.tensor([int(i) in keep for i in ids], dtype=torch.bool)
            seen.append(ids[chosen])
            for space in wanted.spaces:
                parts = [extractors[space](part.to(world.device)) for part in images]
                for feature in parts[0]:
                    name = f"{space}.{feature}"
                    if name in moments or name in kept:
                        values = torch.cat([part[feature] for part in parts])
                        if name in moments:
                            moments[name].update(values)
                        if name in kept:
                            kept[name].append(values.cpu()[chosen])
            progress(len(ids))

    on_all(world, look)
    if world.size > 1:
        for name in sorted(moments):  # the same order on all
            moments[name].merge_ranks()
    order = torch.cat(seen) if seen else torch.empty(0, dtype=torch.int64)
    whole = _gathered(kept, order, world)
    return FeatureSet(source.num, {k: _on_host(m) for k, m in moments.items()}, whole)


def _gathered(
    kept: Mapping[str, Sequence[Tensor]], order: Tensor, world: World
) -> dict[str, Tensor]:
    """Every rank's kept features in the order of the images, on the first rank (collective)."""
    mine = (order, {name: torch.cat(list(parts)) for name, parts in kept.items() if parts})
    everyone = [mine]
    if world.size > 1:
        everyone = [mine] * world.size
        dist.gather_object(mine, everyone if world.is_rank_0 else None, dst=0)
    if not world.is_rank_0:
        return {}
    rank = torch.cat([order for order, _ in everyone]).argsort()
    return {
        name: torch.cat([parts[name] for _, parts in everyone if name in parts])[rank]
        for name in kept
    }


def _on_host(moments: Moments) -> Moments:
    return Moments(moments.count, moments.mean.cpu(), moments.scatter.cpu())


# What is kept of a reference -------------------------------------------------------------------


class StatisticsCache:
    """Features and moments of data that were seen before: a file for every (data, extractor).

    A file's name is the SHA-256 of its key, which is inside too: the data's SHA-256, and what the
    extractor's features depend on (network, weights, preprocessing).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, data: Path) -> StatisticsCache:
        """The one of data at a path: NAME.statistics in the same folder, for an address in the
        user's cache.
        """
        if is_address(data):
            from fastrepa.data.format.remote import default_cache

            return cls(default_cache().with_name("statistics"))
        place = data.absolute()
        return cls(place.with_name(f"{place.name}.statistics"))

    def path(self, digest: str, extractor: Extractor) -> Path:
        name = hashlib.sha256(_key(digest, extractor).encode()).hexdigest()[:32]
        return self.folder / f"{extractor.name}-{name}.npz"

    def load(self, digest: str, extractor: Extractor, wanted: Wanted) -> FeatureSet | None:
        """Return what is stored of it, where all that is wanted is there."""
        fields = self._fields(digest, extractor)
        try:
            num = int(fields["num"])
            kept = {name: torch.from_numpy(fields[f"{name} kept"]) for name in wanted.kept}
            moments = {
                name: Moments(num, *(torch.from_numpy(fields[f"{name} {x}"]) for x in MOMENTS))
                for name in wanted.moments
            }
        except KeyError:
            return None
        return FeatureSet(num, moments, kept)

    def save(self, digest: str, extractor: Extractor, found: FeatureSet) -> None:
        """Add it to what is stored, whole or not at all. Raises OSError where that cannot be."""
        mine = extractor.name + "."
        fields = self._fields(digest, extractor)
        fields |= {"key": np.array(_key(digest, extractor)), "num": np.array(found.num)}
        for name, moments in found.moments.items():
            if name.startswith(mine):
                fields |= {f"{name} {x}": getattr(moments, x).numpy() for x in MOMENTS}
        fields |= {
            f"{name} kept": x.numpy() for name, x in found.kept.items() if name.startswith(mine)
        }
        path = self.path(digest, extractor)
        self.folder.mkdir(parents=True, exist_ok=True)
        with aside(path) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **fields)

    def _fields(self, digest: str, extractor: Extractor) -> dict[str, np.ndarray]:
        """Read the file; nothing where it is missing, damaged or of another key."""
        try:
            fields = read_npz(self.path(digest, extractor))
        except DataError:
            return {}
        return fields if fields.get("key") == _key(digest, extractor) else {}


def _key(digest: str, extractor: Extractor) -> str:
    return json.dumps([VERSION, digest, extractor.identity, KEPT])


def save_statistics(path: Path, gaussians: Mapping[str, Gaussian]) -> None:
    """Inception's means and covariances as ADM and pytorch-fid store them (mu, sigma, mu_s, ...).

    Raises DataError where there are none of them, or the file cannot be written.
    """
    fields: dict[str, np.ndarray] = {}
    for feature, keys in STATISTICS.items():
        if found := gaussians.get(f"inception.{feature}"):
            fields |= {key: value.numpy() for key, value in zip(keys, found, strict=True)}
    if not fields:
        raise DataError(f"{path}: statistics are those of fid and sfid, and neither was computed")
    with writing(path, DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **fields)
