"""The contact sheet of a set by classes: a row of images for each, from the shards themselves."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import Manifest

CLASSES, IMAGES = 16, 8  # rows and columns of a sheet, at most
_SIDE = 128  # larger images are reduced to this
_NAME = 36  # characters of a class's name


def class_sheet(folder: Path, manifest: Manifest) -> bytes:
    """A PNG with the first images of up to 16 classes, evenly spaced over all of them."""
    from fastrepa.data.sheet import Strip, comparison

    number = len(manifest.classes)
    rows = min(number, CLASSES)
    labels = [row * number // rows for row in range(rows)]
    pictures = _first_images(folder, manifest, labels)
    strips = []
    for label in labels:
        record = manifest.classes[label]
        name = record.name if len(record.name) <= _NAME else record.name[: _NAME - 1] + "…"
        remark = f"{record.samples:,} image{'s' if record.samples != 1 else ''}"
        strips.append(Strip(pictures[label], name, remark, smooth=True))
    shown = f" ({rows} shown)" if rows < number else ""
    title = f"{manifest.num_samples:,} images, {number:,} classes{shown}, {manifest.resolution} px"
    columns = max(len(strip.pictures) for strip in strips)
    buffer = io.BytesIO()
    comparison(strips, [("", "")] * columns, title).save(buffer, "PNG")
    return buffer.getvalue()


def _first_images(
    folder: Path, manifest: Manifest, labels: list[int]
) -> dict[int, list[np.ndarray]]:
    found: dict[int, list[np.ndarray]] = {label: [] for label in labels}
    wanted = {label: min(IMAGES, manifest.classes[label].samples) for label in labels}
    for shard in manifest.shards:
        if all(len(found[label]) == wanted[label] for label in labels):
            break
        index = load_index(folder / shard.index.file)
        with (folder / shard.file).open("rb") as file:
            for record in index[np.isin(index["label"], labels)]:
                images = found[int(record["label"])]
                if len(images) < IMAGES:
                    file.seek(int(record["image_offset"]))
                    images.append(_small(file.read(int(record["image_size"]))))
    return found


def _small(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if image.width > _SIDE:
        image = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image)
