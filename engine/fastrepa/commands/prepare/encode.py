"""Columns for a prepared set: latents and features, made in large batches on every rank.

The images are read back through the training's own pipeline, so what is stored is what training
would have computed from them. Rank r of W takes the shards r, r + W, ...; a shard's batches are cut
inside it and always full (the last one repeats its last image), so a row depends on neither ranks
nor restarts. A column file appears whole, with its record beside it; a run that was killed goes on
after the last one. The manifest names the new columns when all of them are there.

Of a column that the set has already, files that are missing or damaged are made again, the others
stay: so the columns of a set, of which nothing is read here, may be in any state.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastrepa.commands.prepare.column_files import (
    Column,
    ColumnFile,
    difference,
    finished,
    identity,
    paths,
)
from fastrepa.commands.prepare.column_makers import (
    DTYPES,
    Maker,
    Precision,
    column_makers,
    own_grid_encoder,
)
from fastrepa.config import CodecConfig, DataConfig, EncoderConfig
from fastrepa.config.values import is_own
from fastrepa.data.format.columns import open_rows
from fastrepa.data.format.shards import (
    FeaturesColumn,
    FileRecord,
    Manifest,
    MomentsColumn,
    ShardSet,
    load_manifest,
    size_problem,
)
from fastrepa.data.format.writing import write_manifest
from fastrepa.data.pipeline import DataPipeline
from fastrepa.errors import ConfigError, DataError, worded
from fastrepa.reading.text import expanded
from fastrepa.runtime.files import sha256_of
from fastrepa.runtime.progress import BYTES, Bar
from fastrepa.runtime.world import World, launched_world
from fastrepa.vision.codec import build_codec
from fastrepa.vision.registry import parse_encoders

MIN_COSINE = 0.999  # of a stored token to the encoder's, below which print_encoded warns
PENDING_WRITES = 4  # batches that wait for the disk, at most


@dataclass(frozen=True)
class EncodeReport:
    """The columns that `encode_columns` left: all asked for, and those of them that were there."""

    columns: tuple[Column, ...]
    kept: tuple[str, ...]


def encode_columns(
    folder: Path,
    *,
    codec: CodecConfig | None = None,
    encoders: Sequence[EncoderConfig] = (),
    reference: Path | None = None,
    flip: bool = False,
    precision: Precision = "bf16",
    batch_size: int = 64,
    replace: bool = False,
    device: torch.device | None = None,
    world: World | None = None,
    progress: bool = True,
) -> EncodeReport:
    """Add columns to the prepared set in `folder` (collective over `world`).

    Args:
        codec: sd-vae: store the moments (mean, std; fp16).
        encoders: store each one's patch tokens on its own grid, int8 with a scale per token.
        reference: REPA's reference layout that the set was made of: copy its moments.
        flip: also those of the mirrored images, for `data.flip`.
        precision: what the networks compute in; the training's own, to store what it would see.
        batch_size: images per forward.
        replace: make a column anew where the set holds one of that name with other settings;
            without it that is an error. The old files stay until the new ones are complete. Files
            of the same settings are hashed, as they are with `reference`, to make those again
            whose contents were altered; what is missing or of another size is made again without
            it, too.
        device: where the networks run; by default this rank's GPU, or the CPU.

    Raises ConfigError for settings, WeightsError for weights, DataError for the set and the disk.
    """
    world = world or World()
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: must be at least 1")
    device = device or launched_world().device
    data = ShardSet.open(folder, verify="sizes", columns=False)
    makers = column_makers(data, codec, encoders, reference, flip, precision, device)
    wanted = tuple(maker.column for maker in makers)
    present = {column.name: column for column in data.manifest.columns}
    for column in wanted:
        old = present.get(column.name)
        if old is not None and identity(old) != identity(column) and not replace:
            raise ConfigError(
                f"{folder}: holds {column.name} already, made with {difference(old, column)}; "
                f"`fastrepa data encode --replace` makes it anew"
            )
    try:
        # Of REPA's layout, whose columns only `prepare` can make, and copies quickly, at all times.
        look = replace or reference is not None
        altered = _altered(data, wanted, world, progress) if look else set()
        todo = {
            shard: missing
            for shard in range(world.rank, len(data.shard_sizes), world.size)
            if (missing := [m for m in makers if not _is_there(data, m.column, shard, altered)])
        }
        _check_space(data, wanted)
        if todo:
            _encode(data, todo, batch_size, device, world, progress)
        world.wait()
        stems = [_stem(data, shard) for shard in range(len(data.shard_sizes))]
        kept = tuple(c.name for c in wanted if not any(finished(folder, c, s) for s in stems))
        world.wait()  # all have looked at the records
        if world.is_rank_0:
            _finish(data, wanted)
        world.wait()
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({worded(error)}); what is finished is kept, the same "
            f"command goes on"
        ) from None
    columns = load_manifest(folder).columns
    names = [column.name for column in wanted]
    return EncodeReport(tuple(c for c in columns if c.name in names), kept)


def encode_settings(
    codec: str | None,
    codec_weights: str | None,
    cache_features: str | None,
    flip: bool,
    precision: str,
    batch_size: int,
    reference: Path | None = None,
) -> dict[str, Any]:
    """Keywords of `encode_columns` from a command's options.

    ConfigError naming the option for a value that is not allowed, or when nothing is asked for.
    """
    if precision not in DTYPES:
        raise ConfigError(f"--precision: {precision!r} is not one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size: {batch_size} is not at least 1")
    if codec not in (None, "sd-vae"):
        raise ConfigError(f"--codec: {codec!r} is not sd-vae, the codec with latents to store")
    if codec_weights and not codec:
        raise ConfigError("--codec-weights: give --codec sd-vae too")
    if not codec and not cache_features:
        if flip:
            raise ConfigError("--flip: give --codec sd-vae or --cache-features, which it mirrors")
        if reference is None:
            raise ConfigError("nothing to encode: give --codec sd-vae, --cache-features or both")
    encoders = parse_encoders(cache_features, "--cache-features") if cache_features else ()
    if own := [encoder.name for encoder in encoders if is_own(encoder.name)]:
        raise ConfigError(f"--cache-features: {own[0]}: takes encoders by name, not from a file")
    chosen: dict[str, Any] = {"weights": expanded(codec_weights)} if codec_weights else {}
    return {
        "codec": CodecConfig(name="sd-vae", **chosen) if codec else None,
        "encoders": encoders,
        "reference": reference,
        "flip": flip,
        "precision": precision,
        "batch_size": batch_size,
    }


def check_networks(resolution: int, settings: dict[str, Any]) -> None:
    """Build what `encode_columns` will need, on the CPU, so that it fails before hours of images.

    Raises ConfigError and WeightsError as it would. On the first rank alone.
    """
    if not launched_world().is_rank_0:
        return
    if settings["codec"] is not None:
        build_codec(settings["codec"], resolution=resolution)
    for encoder in settings["encoders"]:
        own_grid_encoder(encoder, resolution, torch.float32, torch.device("cpu"))


def print_encoded(report: EncodeReport, console: Console) -> None:
    """A line for every column asked for: its size, what it holds, and what it costs in accuracy."""
    for column in report.columns:
        size = sum(file.bytes for file in column.files) / 1e6
        views = ", mirrored too" if column.views == 2 else ""
        if isinstance(column, MomentsColumn):
            what = f"{2 * column.channels}x{column.side}x{column.side} fp16"
        else:
            what = (
                f"{column.grid}x{column.grid}x{column.width} int8, lowest cosine of a token "
                f"{column.min_cosine:.5f}"
            )
        there = " (was there)" if column.name in report.kept else ""
        console.print(f"{column.name}: {size:.1f} MB, {what}{views}{there}")
        if isinstance(column, FeaturesColumn) and column.min_cosine < MIN_COSINE:
            console.print(
                f"warning: {column.name}: below {MIN_COSINE}: this encoder has tokens of a few huge"
                f" values, which int8 stores coarsely; train with vision.targets=online",
            )


# The set ------------------------------------------------------------------------------------------


def _stem(data: ShardSet, shard: int) -> str:
    return Path(data.manifest.shards[shard].file).stem


_Altered = set[tuple[str, int]]  # column and shard


def _is_there(data: ShardSet, column: Column, shard: int, altered: _Altered) -> bool:
    """Tell whether a shard's file of the column need not be made: it was finished, by this run or
    one before, or is the set's own; and sound, as far as is seen without reading it, and known.
    """
    if (column.name, shard) in altered:
        return False
    if finished(data.path, column, _stem(data, shard)):
        return True
    record = _listed(data, column, shard)
    if record is None or size_problem(data.path, record) is not None:
        return False
    try:
        samples = data.shard_sizes[shard]
        open_rows(data.path / record.file, column.dtype, samples, column.views)
    except DataError:
        return False
    return True


def _listed(data: ShardSet, column: Column, shard: int) -> FileRecord | None:
    """Return the manifest's record of a shard's file, where the set has this very column."""
    old = {c.name: c for c in data.manifest.columns}.get(column.name)
    if old is None or identity(old) != identity(column):
        return None
    return old.files[shard] if len(old.files) == len(data.shard_sizes) else None


def _altered(data: ShardSet, columns: Sequence[Column], world: World, progress: bool) -> _Altered:
    """Find this rank's files whose SHA-256 is not what was recorded of them."""
    there = [
        (column, shard)
        for column in columns
        for shard in range(world.rank, len(data.shard_sizes), world.size)
        if _is_there(data, column, shard, set())
    ]
    sizes = [data.shard_sizes[shard] * c.views * c.dtype.itemsize for c, shard in there]
    found: _Altered = set()
    shown = progress and world.is_rank_0 and bool(there)
    with Bar("checking columns", sum(sizes), BYTES, shown=shown, rate=True) as bar:
        for (column, shard), size in zip(there, sizes, strict=True):
            done = finished(data.path, column, _stem(data, shard))
            listed = _listed(data, column, shard)
            record = FileRecord.model_validate(done["file"]) if done else listed
            assert record is not None
            if sha256_of(data.path / record.file) != record.sha256:
                found.add((column.name, shard))
                paths(data.path, column, _stem(data, shard))[1].unlink(missing_ok=True)
            bar.advance(size)
    return found


def _check_space(data: ShardSet, columns: Sequence[Column]) -> None:
    needed = sum(
        data.shard_sizes[shard] * column.views * column.dtype.itemsize
        for column in columns
        for shard in range(len(data.shard_sizes))
        if not _is_there(data, column, shard, set())
    )
    free = shutil.disk_usage(data.path).free
    if needed > free:
        names = ", ".join(column.name for column in columns)
        raise DataError(
            f"{data.path}: {names} take {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB "
            "free"
        )


def _finish(data: ShardSet, columns: Sequence[Column]) -> None:
    """Put what was made in the manifest, then remove what it replaces."""
    new: dict[str, Any] = {}
    records = []
    before = data.manifest
    present = {column.name: column for column in before.columns}
    for column in columns:
        files, cosines = [], []
        for shard in range(len(data.shard_sizes)):
            done = finished(data.path, column, _stem(data, shard))
            if done is not None:
                files.append(FileRecord.model_validate(done["file"]))
                cosines.append(done["min_cosine"])
                records.append(paths(data.path, column, _stem(data, shard))[1])
            elif (listed := _listed(data, column, shard)) is not None:
                files.append(listed)
            else:
                raise DataError(
                    f"{data.path}: {column.name} of {_stem(data, shard)} was not finished"
                )
        if not cosines:
            continue  # all of it was there
        update: dict[str, Any] = {"files": tuple(files)}
        if isinstance(column, FeaturesColumn):
            if len(cosines) < len(files):  # the others' share is in the set's
                cosines.append(getattr(present[column.name], "min_cosine", 1.0))
            update["min_cosine"] = min(cosines)
        new[column.name] = column.model_copy(update=update)
    if not new:
        return
    features = {column.name: column for column in before.features}
    features |= {k: v for k, v in new.items() if isinstance(v, FeaturesColumn)}
    after = before.model_copy(
        update={
            "moments": new.get("moments", before.moments),
            "features": tuple(features[name] for name in sorted(features)),
        }
    )
    write_manifest(data.path, after)
    for record in records:
        record.unlink()
    for path in _files(before) - _files(after):
        (data.path / path).unlink(missing_ok=True)


def _files(manifest: Manifest) -> set[str]:
    return {record.file for column in manifest.columns for record in column.files}


# The pass over the images -------------------------------------------------------------------------


class _ShardByShard:
    """Positions of some shards in full batches: the last of a shard repeats its last sample."""

    def __init__(self, shards: Sequence[int], sizes: Sequence[int], batch: int) -> None:
        self._shards, self._sizes = list(shards), [sizes[shard] for shard in shards]
        self._starts = np.cumsum([0, *(-(-size // batch) * batch for size in self._sizes)])
        self.num_samples = int(self._starts[-1])

    def locate(self, position: int) -> tuple[int, int]:
        position %= self.num_samples
        place = int(np.searchsorted(self._starts, position, side="right")) - 1
        sample = min(position - int(self._starts[place]), self._sizes[place] - 1)
        return self._shards[place], sample


def _encode(
    data: ShardSet,
    todo: Mapping[int, Sequence[Maker]],
    batch_size: int,
    device: torch.device,
    world: World,
    progress: bool,
) -> None:
    """Make this rank's missing column files."""
    mine = "" if world.size == 1 else f", rank {world.rank + 1} of {world.size}"
    reads_images = any(maker.reads_images for makers in todo.values() for maker in makers)
    show = progress and world.is_rank_0
    total = sum(data.shard_sizes[shard] for shard in todo)
    with (
        Bar(f"encoding{mine}", total, "images", shown=show, rate=True, stays=True) as bar,
        _images(data, list(todo), batch_size, device, reads_images) as images,
        ThreadPoolExecutor(1, "column-writer") as writer,
    ):
        waiting: list[Future[None]] = []
        for shard, missing in todo.items():
            size = data.shard_sizes[shard]
            files = [
                ColumnFile(data.path, maker.column, shard, _stem(data, shard), size)
                for maker in missing
            ]
            try:
                for first in range(0, size, batch_size):
                    batch = next(images)
                    samples = range(first, min(first + batch_size, size))
                    for maker, file in zip(missing, files, strict=True):
                        rows, cosine = _named(maker, batch, data, shard, samples)
                        waiting.append(writer.submit(file.append, rows, cosine))
                    while len(waiting) > PENDING_WRITES:
                        waiting.pop(0).result()
                    bar.advance(len(samples))
                while waiting:
                    waiting.pop(0).result()
                for file in files:
                    file.finish()
            except BaseException:
                for future in waiting:
                    future.cancel()
                writer.shutdown()
                for file in files:
                    file.drop()
                raise


def _named(
    maker: Maker, images: Tensor | None, data: ShardSet, shard: int, samples: range
) -> tuple[np.ndarray, float]:
    """The maker's rows; its errors name the shard and the samples."""
    try:
        rows: tuple[np.ndarray, float] = maker.rows(images, shard, samples)
        return rows
    except DataError as error:
        where = f"{data.path / data.manifest.shards[shard].file}"
        raise DataError(
            f"{where}: samples {samples.start} to {samples.stop - 1}: {error}"
        ) from None


@contextmanager
def _images(
    data: ShardSet, shards: list[int], batch: int, device: torch.device, reads_images: bool
) -> Iterator[Iterator[Tensor | None]]:
    """Full batches uint8 [batch,3,R,R] of the shards, one after the other."""
    if not reads_images:
        yield iter(lambda: None, 0)
        return
    config = DataConfig(path=str(data.path), resolution=data.resolution)
    with DataPipeline(
        data,
        config,
        global_batch=batch,
        micro_batch=batch,
        device=device,
        order=_ShardByShard(shards, data.shard_sizes, batch),
    ) as batches:
        yield (b.image_u8 for b in batches)
