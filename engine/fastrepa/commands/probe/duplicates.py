"""Images that are nearly the same: by a hash of the picture, by their features, and as groups.

Near-identical images on both sides of a split would let a probe remember instead of tell.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastrepa.commands.probe.similarity import unit_rows

HASH_SIDE = 16
HASH_BITS = 8  # of 256 that two pictures' hashes may differ in
COSINE = 0.95  # of centred token maps, at least
ROWS = 256  # compared with all others at a time


def difference_hash(image: np.ndarray) -> np.ndarray:
    """Return bool [256]: is a pixel of the 17 x 16 grey thumbnail brighter than its left one?

    image uint8 [H,W,3]. "dHash" (Krawetz 2013, "Kind of Like That"), with 16 x 16 comparisons: it
    keeps under scaling, compression and changes of brightness.
    """
    size = (HASH_SIDE + 1, HASH_SIDE)
    grey = Image.fromarray(image).convert("L").resize(size, Image.Resampling.LANCZOS)
    levels = np.asarray(grey).astype(np.int16)
    return (levels[:, 1:] > levels[:, :-1]).ravel()


def alike_by_hash(hashes: np.ndarray) -> np.ndarray:
    """Pairs [P,2] of rows of bool [N,256] that differ in at most HASH_BITS bits."""
    signs = np.where(hashes, 1.0, -1.0)
    least = hashes.shape[1] - 2 * HASH_BITS
    return _pairs(signs, least)


def alike_by_features(tokens: np.ndarray) -> np.ndarray:
    """Pairs [P,2] of images whose token maps [N,T,Z], less the mean map, have a cosine of COSINE.

    Less the mean, because tokens that share most of it are all alike.
    """
    x = tokens.reshape(len(tokens), -1).astype(np.float64)
    x -= x.mean(0)
    return _pairs(unit_rows(x), COSINE)


def groups_of(count: int, *pairs: np.ndarray) -> np.ndarray:
    """A group number [count] for each image: those joined by a chain of pairs share one."""
    group = np.arange(count)

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = int(group[i])
        return i

    for first, second in np.concatenate([*pairs, np.zeros((0, 2), dtype=np.int64)]):
        a, b = sorted((root(int(first)), root(int(second))))
        group[b] = a
    return np.array([root(i) for i in range(count)])


def _pairs(x: np.ndarray, least: float) -> np.ndarray:
    """Pairs [P,2] of rows of x [N,D], the first before the second, of a product of `least`."""
    found = [np.zeros((0, 2), dtype=np.int64)]
    for first in range(0, len(x), ROWS):
        rows, columns = np.nonzero(x[first : first + ROWS] @ x.T >= least)
        rows += first
        found.append(np.stack([rows, columns], 1)[rows < columns])
    return np.concatenate(found)
