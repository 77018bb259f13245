"""Columns: what is stored beside the images, one file per shard, one fixed-size row per sample.

    shard-00000.moments.VERSION.npy            [n, V] of (moments <f2 [2C,h,w], crc32 <u4)
    shard-00000.features.ENCODER.VERSION.npy   [n, V] of (scale <f2 [T], tokens i1 [T,Z], crc32 <u4)

VERSION is a hash of what the column was made with. Rows stand in the order of the shard's index.
V views: view 0 is the image as it is, view 1, where there is one, its mirror image. crc32 is
zlib's, of the row's bytes before it. The files are plain `.npy` (`np.load(file,
mmap_mode="r")["tokens"]`), apart from the tar, so that a column can be added to a finished set, or
left unread, without touching an image.

n samples, C latent channels, h and w latent sides, T tokens (row-major), Z feature width.
This module imports nothing but numpy and what reads its files.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from fastrepa.errors import DataError
from fastrepa.reading.arrays import map_npy, read_header

CRC_BYTES = 4
_MISSING = "missing, but the manifest lists it"


def moments_dtype(channels: int, side: int) -> np.dtype:
    """One row of moments: cat[mean, std], fp16 [2 * channels, side, side], and its CRC-32."""
    return np.dtype([("moments", "<f2", (2 * channels, side, side)), ("crc32", "<u4")])


def features_dtype(tokens: int, width: int) -> np.dtype:
    """One row of features: token t is scale[t] * tokens[t]; fp16 [T], int8 [T,Z], its CRC-32."""
    return np.dtype([("scale", "<f2", (tokens,)), ("tokens", "i1", (tokens, width)),
                     ("crc32", "<u4")])  # fmt: skip


def seal(rows: np.ndarray) -> None:
    """Fill in, in place, the CRC-32 of every row of a contiguous structured array."""
    size = rows.dtype.itemsize
    flat = rows.reshape(-1)
    raw = flat.view(np.uint8).reshape(len(flat), size)
    flat["crc32"] = [zlib.crc32(row[: size - CRC_BYTES].data) for row in raw]


def open_rows(path: Path, dtype: np.dtype, samples: int, views: int) -> np.ndarray:
    """The rows [samples, views] of a column file, memory-mapped; DataError when it is not one."""
    first_row(path, dtype, samples, views)
    return map_npy(path, "a readable column", missing=_MISSING)


def first_row(path: Path, dtype: np.dtype, samples: int, views: int) -> int:
    """The offset of the first of these rows in a column file; DataError when it is not one."""
    header = read_header(path, "a readable column", missing=_MISSING)
    if header.dtype != dtype or header.shape != (samples, views):
        raise DataError(
            f"{path}: rows of {header.dtype} in shape {list(header.shape)}; the manifest says "
            f"{dtype} in shape {[samples, views]}"
        )
    return len(header.raw)


def first_damaged(rows: np.ndarray) -> int | None:
    """Number of the first sample of [n, V] rows with a CRC-32 that is not its bytes'; or None."""
    size = rows.dtype.itemsize
    for number, row in enumerate(rows):
        for view in np.ascontiguousarray(row):
            if zlib.crc32(view.tobytes()[: size - CRC_BYTES]) != view["crc32"]:
                return number
    return None
