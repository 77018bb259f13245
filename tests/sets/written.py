"""Sets written record by record, with columns whose every value tells sample and view."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastrepa.data.format.columns import seal
from fastrepa.data.format.index import INDEX_DTYPE
from fastrepa.data.format.shards import (
    EXTENSIONS,
    ClassRecord,
    FeaturesColumn,
    FileRecord,
    Manifest,
    MomentsColumn,
    ShardRecord,
    ShardSet,
)
from fastrepa.data.format.writing import write_manifest
from fastrepa.data.images import encode
from tests.sets.trees import noise

RESOLUTION, SAMPLES, CLASSES = 16, 34, 3
CHANNELS, SIDE = 2, 2  # of the moments
GRID, WIDTH = 2, 5  # of the features


def image(number: int, resolution: int = RESOLUTION) -> np.ndarray:
    """Image of sample `number`: uint8 [resolution, resolution, 3], not symmetric."""
    return noise(number, resolution, resolution)


def label(number: int) -> int:
    return number * 7 % CLASSES


def moments(number: int, view: int) -> np.ndarray:
    """Return a sample's moments, fp16 [2 * CHANNELS, SIDE, SIDE]."""
    values = np.arange(2 * CHANNELS * SIDE**2).reshape(2 * CHANNELS, SIDE, SIDE)
    return (values / 16 + number + 100 * view).astype(np.float16)


def scale(number: int, view: int) -> np.ndarray:
    """Return the scales of a sample's tokens, fp16 [GRID^2]."""
    return (np.arange(GRID**2) / 8 + number + 200 * view).astype(np.float16)


def tokens(number: int, view: int) -> np.ndarray:
    """Return a sample's tokens, int8 [GRID^2, WIDTH]."""
    return (np.arange(GRID**2 * WIDTH).reshape(GRID**2, WIDTH) + number - 100 * view).astype(
        np.int8
    )


def write_set(
    folder: Path,
    *,
    samples: int = SAMPLES,
    shard_size: int = 8,
    image_format: str = "png",
    quality: int = 95,
    resolution: int = RESOLUTION,
    latents: int = 0,
    encoders: dict[str, int] | None = None,
) -> ShardSet:
    """Write a set of `samples` images: moments of `latents` views, features of {encoder: views}."""
    folder.mkdir(parents=True)
    numbers = [range(i, min(i + shard_size, samples)) for i in range(0, samples, shard_size)]
    moments_column = None
    if latents:
        moments_column = MomentsColumn(
            views=latents, precision="fp32", weights="random", digest=None, files=(),
            channels=CHANNELS, side=SIDE,
        )  # fmt: skip
        files = _column(folder, moments_column, numbers)
        moments_column = moments_column.model_copy(update={"files": files})
    features = []
    for encoder, views in (encoders or {}).items():
        column = FeaturesColumn(
            views=views, precision="fp32", weights="random", digest=None, files=(),
            encoder=encoder, timm_name=encoder, input_side=16, grid=GRID, width=WIDTH,
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), order="normalise-resize", norm=True,
            min_cosine=0.999,
        )  # fmt: skip
        files = _column(folder, column, numbers)
        features.append(column.model_copy(update={"files": files}))
    shards = []
    for shard, part in enumerate(numbers):
        name = f"shard-{shard:05d}"
        records = np.zeros(len(part), INDEX_DTYPE)
        with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for record, number in zip(records, part, strict=True):
                picture = Image.fromarray(image(number, resolution))
                data = encode(picture, image_format, quality)  # type: ignore[arg-type]
                member = tarfile.TarInfo(f"{number:08d}.{EXTENSIONS[image_format]}")
                member.size = len(data)
                start = tar.offset + 512
                tar.addfile(member, io.BytesIO(data))
                record["key"] = f"{number:08d}".encode()
                record["label"] = label(number)
                record["image_offset"], record["image_size"] = start, len(data)
                record["image_crc32"] = zlib.crc32(data)
        np.save(folder / f"{name}.idx.npy", records)
        tar_file = FileRecord.of(folder / f"{name}.tar")
        index = FileRecord.of(folder / f"{name}.idx.npy")
        shards.append(ShardRecord(**tar_file.model_dump(), samples=len(part), index=index))
    (folder / "sources.jsonl").write_text("".join(f'"{n}.png"\n' for n in range(samples)))
    labels = [label(number) for number in range(samples)]
    manifest = Manifest(
        resolution=resolution,
        image_format=image_format,  # type: ignore[arg-type]
        quality=quality,
        seed=0,
        num_samples=samples,
        classes=tuple(ClassRecord(name=f"c{i}", samples=labels.count(i)) for i in range(CLASSES)),
        shards=tuple(shards),
        sources=FileRecord.of(folder / "sources.jsonl"),
        moments=moments_column,
        features=tuple(features),
    )
    write_manifest(folder, manifest)
    return ShardSet.open(folder)


def _column(
    folder: Path, column: MomentsColumn | FeaturesColumn, numbers: list[range]
) -> tuple[FileRecord, ...]:
    records = []
    for shard, part in enumerate(numbers):
        rows = np.zeros((len(part), column.views), column.dtype)
        for i, number in enumerate(part):
            for view in range(column.views):
                if isinstance(column, MomentsColumn):
                    rows[i, view]["moments"] = moments(number, view)
                else:
                    rows[i, view]["scale"] = scale(number, view)
                    rows[i, view]["tokens"] = tokens(number, view)
        seal(rows)
        path = folder / f"shard-{shard:05d}.{column.name}.npy"
        np.save(path, rows)
        records.append(FileRecord.of(path))
    return tuple(records)


def write_reference(folder: Path, samples: int = SAMPLES, per_folder: int = 10) -> Path:
    """Write the same images and (fp32) moments in the reference's layout, its list in no order."""
    labels = []
    for number in range(samples):
        below = f"{number // per_folder:05d}"
        for part in ("images", "vae-sd"):
            (folder / part / below).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(number)).save(folder / f"images/{below}/img{number:08d}.png")
        name = f"{below}/img-mean-std-{number:08d}.npy"
        np.save(folder / "vae-sd" / name, moments(number, 0).astype(np.float32))
        labels.append([name, label(number)])
    order = np.random.default_rng(0).permutation(samples)
    listed = {"labels": [labels[i] for i in order]}
    (folder / "vae-sd/dataset.json").write_text(json.dumps(listed))
    return folder


def relabel(root: Path, change: Callable[[list[Any]], object]) -> None:
    """Change the list of [file, label] in the dataset.json of REPA's layout."""
    path = root / "vae-sd/dataset.json"
    listed = json.loads(path.read_text())
    change(listed["labels"])
    path.write_text(json.dumps(listed))
