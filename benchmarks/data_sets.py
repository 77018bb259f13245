"""Sets to measure reading with: synthetic photo-like images, and columns of random values.

An image is a sum of waves whose amplitude falls with frequency as a photograph's does (1/f^1.2),
correlated over the colours, with a few flat shapes (edges) and a little sensor noise. What decoding
costs depends on the bytes of an image, which every record states.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastrepa.commands.prepare.prepare import prepare
from fastrepa.data.format.columns import seal
from fastrepa.data.format.shards import (
    FeaturesColumn,
    FileRecord,
    MomentsColumn,
    ShardSet,
)
from fastrepa.data.format.writing import write_manifest

RESOLUTION = 256
CLASSES = 10
LATENT = (4, 32)  # channels and side: Stable Diffusion's of 256 px
DINOV2_B = (16, 768)  # grid and width


def photo(seed: int, side: int) -> Image.Image:
    """A synthetic RGB image [side, side] with a photograph's spectrum."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1 / side
    spectrum = rng.normal(size=(3, side, side)) + 1j * rng.normal(size=(3, side, side))
    waves = np.fft.ifft2(spectrum / frequency**1.2).real
    waves /= waves.std((1, 2), keepdims=True)
    colours = 128 + 50 * (0.8 * waves[:1] + 0.35 * waves)
    image = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    draw = ImageDraw.Draw(image)
    for x0, y0, x1, y1, *colour in rng.integers(0, side, (6, 7)).tolist():
        box = (min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1)
        draw.ellipse(box, fill=tuple(min(c, 255) for c in colour))
    noisy = np.asarray(image) + rng.normal(size=(side, side, 1)) * 2
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def image_set(folder: Path, samples: int, shards: int) -> ShardSet:
    """JPEG shards (quality 95, 4:4:4) as `fastrepa prepare --format jpeg` makes them."""
    source = folder / "source"
    for number in range(samples):
        place = source / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        photo(number, RESOLUTION).save(place / f"{number:06d}.png", compress_level=1)
    prepare(
        source,
        folder / "images",
        resolution=RESOLUTION,
        shard_size=-(-samples // shards),
        image_format="jpeg",
        workers=0,
        progress=False,
    )
    return ShardSet.open(folder / "images")


def add_columns(shards: ShardSet) -> ShardSet:
    """Add moments [8,32,32] and features of DINOv2-B's size to the set, of random values."""
    (channels, side), (grid, width) = LATENT, DINOV2_B
    moments = MomentsColumn(
        views=1, precision="fp32", weights="random", digest=None, files=(),
        channels=channels, side=side,
    )  # fmt: skip
    features = FeaturesColumn(
        views=1, precision="fp32", weights="random", digest=None, files=(), encoder="dinov2-vit-b",
        timm_name="random", input_side=224, grid=grid, width=width, mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5), order="normalise-resize", norm=True, min_cosine=0.999,
    )  # fmt: skip
    files: dict[str, list[FileRecord]] = {moments.name: [], features.name: []}
    for shard, size in enumerate(shards.shard_sizes):
        rng = np.random.default_rng(shard)
        for column in (moments, features):
            rows = np.zeros((size, 1), column.dtype)
            if isinstance(column, MomentsColumn):
                rows["moments"] = rng.normal(size=rows["moments"].shape)
            else:
                rows["scale"] = rng.uniform(0.01, 0.05, rows["scale"].shape)
                rows["tokens"] = rng.integers(-127, 128, rows["tokens"].shape, dtype=np.int8)
            seal(rows)
            path = shards.path / f"shard-{shard:05d}.{column.name}.npy"
            np.save(path, rows)
            files[column.name].append(FileRecord.of(path))
    changed = shards.manifest.model_copy(
        update={
            "moments": moments.model_copy(update={"files": tuple(files[moments.name])}),
            "features": (features.model_copy(update={"files": tuple(files[features.name])}),),
        }
    )
    write_manifest(shards.path, changed)
    return ShardSet.open(shards.path)


def reference_set(folder: Path, samples: int, per_folder: int = 128) -> Path:
    """PNG images and fp32 moments [8,32,32] of random values in the reference's layout."""
    channels, side = LATENT
    rng, labels = np.random.default_rng(0), []
    for number in range(samples):
        below = f"{number // per_folder:05d}"
        for part in ("images", "vae-sd"):
            (folder / part / below).mkdir(parents=True, exist_ok=True)
        photo(number, RESOLUTION).save(folder / f"images/{below}/img{number:08d}.png")
        name = f"{below}/img-mean-std-{number:08d}.npy"
        moments = rng.normal(size=(2 * channels, side, side)).astype(np.float32)
        np.save(folder / "vae-sd" / name, moments)
        labels.append([name, number % CLASSES])
    (folder / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))
    return folder
