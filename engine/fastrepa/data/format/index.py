"""The index of one shard: where each sample's bytes lie in the tar, and what they must be.

A structured numpy array, one record per sample in the order of the tar, saved as
`shard-00000.idx.npy` (about 32 bytes a sample). Members that a later set stores beside the image
(moments, features) add fields of their own; a reader takes the fields it knows.

This module and `reader.py` import little: DALI's worker processes load them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np

from fastrepa.errors import DataError
from fastrepa.reading.arrays import read_npy

KEY_DIGITS = 8
BLOCK = 512  # bytes of a tar header, and what a member is padded to a multiple of

_Size = TypeVar("_Size", int, np.ndarray)

INDEX_DTYPE = np.dtype(
    [
        ("key", f"S{KEY_DIGITS}"),  # the name of the tar members without their extension
        ("label", "<i4"),  # class index, 0 .. classes-1
        ("image_offset", "<i8"),  # of the first byte of the image in the shard file
        ("image_size", "<i4"),  # bytes
        ("image_crc32", "<u4"),  # zlib.crc32 of the image's bytes
    ]
)


def load_index(path: Path) -> np.ndarray:
    """Read an index [samples] of `INDEX_DTYPE`'s fields; DataError when it is not one."""
    index = read_npy(path, "a readable shard index", missing="the shard's index is missing")
    missing = [name for name in INDEX_DTYPE.names or () if name not in (index.dtype.names or ())]
    if index.ndim != 1 or missing:
        raise DataError(
            f"{path}: not a shard index (lacks {', '.join(missing) or 'one dimension'})"
        )
    return index


def padded(size: _Size) -> _Size:
    """Return the bytes that `size` bytes take in a tar."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def key_text(key: bytes) -> str:
    """Return a key of an index as text, whatever its bytes."""
    return key.decode("ascii", "backslashreplace")
