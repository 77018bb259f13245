"""Likeness of two representations of the same images, and what one is like by itself.

Pure functions of numpy arrays, computed in float64. N images (or samples), T patch tokens of an
image on an h x w grid, row-major, D and Z feature widths.

    cknna            Huh et al. 2024, "The Platonic Representation Hypothesis", as their code has it
    linear_cka       Kornblith et al. 2019, eq. 2, debiased as in Nguyen et al. 2021
    effective_rank   Roy and Vetterli 2007; of features: RankMe (Garrido et al. 2023)
    local_distant_similarity, contrast
                     Singh et al. 2025, "What matters for Representation Alignment: Global
                     Information or Spatial Structure?" (iREPA): LDS and RMSC
"""

from __future__ import annotations

import math

import numpy as np

NEIGHBOURS = 10  # of cknna; REPA (Yu et al. 2025) reports k = 10
# iREPA's "distant" is a Manhattan distance of 6 on its 16 x 16 grid; other grids keep the share.
DISTANT_SHARE = 6 / 16
CHUNK = 1 << 24  # cosines held at a time


def cknna(x: np.ndarray, y: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Centered kernel nearest-neighbour alignment of x [N,D] and y [N,Z], 1 at most.

    The kernels are cosines (rows are scaled to length 1, as REPA does with pooled features). Entry
    (i, j) counts where j is among the k nearest neighbours of i in both spaces, i itself excluded;
    with HSIC the unbiased estimator (Song et al. 2012, eq. 5) of two kernels masked so,
    cknna(x, y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), where the latter two keep the
    neighbours in one space. Unrelated features come out near k / N. Masked kernels are not
    symmetric and so, in the third digit or beyond, neither is this. Of neighbours equally near,
    those of lower number are taken. nan where a space's HSIC with itself is not positive.

    ValueError: another number of rows, fewer than 4, or k not in 2 .. N - 1.
    """
    x, y = _pair(x, y)
    if not 2 <= k <= len(x) - 1:
        raise ValueError(f"k: {k} is not in 2..{len(x) - 1}")
    kx, ky = _cosine_kernel(x), _cosine_kernel(y)
    near_x, near_y = _nearest(kx, k), _nearest(ky, k)
    both = near_x & near_y
    return _ratio(
        _hsic(kx * both, ky * both),
        _hsic(kx * near_x, kx * near_x),
        _hsic(ky * near_y, ky * near_y),
    )


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centered kernel alignment of x [N,D] and y [N,Z], debiased.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the kernels Xc Xc' and Yc Yc', 1 for equals up to
    rotation and scale, with the unbiased HSIC (Song et al. 2012, eq. 5): by the biased one it is
    large for unrelated features too, where N is not far above D and Z; so it is near 0 then (and
    may be below). nan for a constant x or y.

    ValueError: another number of rows, or fewer than 4.
    """
    x, y = _pair(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    kx, ky = x @ x.T, y @ y.T
    return _ratio(_hsic(kx, ky), _hsic(kx, kx), _hsic(ky, ky))


def effective_rank(x: np.ndarray) -> float:
    """Return exp of the entropy of the singular values of x [N,D], scaled to sum 1: 1 .. min(N, D).

    As given: centre x where its mean is not to count. 0 for a matrix of zeros.
    """
    x = np.asarray(x, dtype=np.float64)
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None))
    # The root makes 1e-8 of the rounding of a zero eigenvalue: that is no direction.
    values = values[values > 1e-7 * values.max(initial=0.0)]
    if not len(values):
        return 0.0
    p = values / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def mean_share(x: np.ndarray) -> float:
    """The share of the mean square of x [N,D] that its mean row has, 0..1: 1 is collapse."""
    x = np.asarray(x, dtype=np.float64)
    total = (x**2).sum(1).mean()
    return float((x.mean(0) ** 2).sum() / total) if total > 0 else 1.0


def mean_cosine(x: np.ndarray) -> float:
    """The mean cosine of two different rows of x [N,D]: 1 is collapse."""
    u = unit_rows(np.asarray(x, dtype=np.float64))
    n = len(u)
    total = float((u.sum(0) ** 2).sum()) - float((u**2).sum())
    return total / (n * (n - 1)) if n > 1 else math.nan


def local_distant_similarity(tokens: np.ndarray) -> np.ndarray:
    """LDS of every image, [N]: how much nearer tokens resemble each other than distant ones.

    tokens [N,T,Z] on a square grid. The mean cosine of tokens that touch (Manhattan distance 1)
    less that of tokens at least 3/8 of the grid's side apart: iREPA's distance of 6 at its
    16 x 16 tokens.
    """
    tokens = np.asarray(tokens)
    side = _side(tokens)
    distance = _distances(side)
    touch, distant = distance == 1, distance >= max(2, round(DISTANT_SHARE * side))
    parts = []
    for first in range(0, len(tokens), chunk := max(1, CHUNK // side**4)):
        u = unit_rows(tokens[first : first + chunk].astype(np.float64))
        cosines = u @ u.transpose(0, 2, 1)  # [n,T,T]
        parts.append(cosines[:, touch].mean(1) - cosines[:, distant].mean(1))
    return np.concatenate(parts)


def contrast(tokens: np.ndarray) -> np.ndarray:
    """RMSC of every image, [N], 0..1: the root mean square distance of its tokens [N,T,Z], scaled
    to length 1, from their mean; 0 where all tokens point one way.
    """
    u = unit_rows(np.asarray(tokens, dtype=np.float64))
    return np.sqrt(((u - u.mean(1, keepdims=True)) ** 2).sum(-1).mean(1))


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays one."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, of as many rows; ValueError."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"expected [N,D] and [N,Z], got {list(x.shape)} and {list(y.shape)}")
    if len(x) < 4:
        raise ValueError(f"{len(x)} rows, at least 4 are needed")
    return x, y


def _cosine_kernel(x: np.ndarray) -> np.ndarray:
    u = unit_rows(x)
    return u @ u.T


def _nearest(kernel: np.ndarray, k: int) -> np.ndarray:
    """Return bool [N,N]: is column j one of the k most similar to row i, itself excluded?"""
    similar = kernel.copy()
    np.fill_diagonal(similar, -np.inf)
    order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    near = np.zeros(kernel.shape, dtype=bool)
    np.put_along_axis(near, order, True, axis=1)
    return near


def _hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The unbiased estimator of the Hilbert-Schmidt independence criterion, N (N - 3) times it."""
    n = len(k)
    k, l = k.copy(), l.copy()  # noqa: E741
    np.fill_diagonal(k, 0.0)
    np.fill_diagonal(l, 0.0)
    trace = float((k * l.T).sum())
    sums = float(k.sum() * l.sum()) / ((n - 1) * (n - 2))
    product = float(k.sum(0) @ l.sum(1)) * 2 / (n - 2)
    return trace + sums - product


def _ratio(cross: float, xx: float, yy: float) -> float:
    return cross / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan


def _side(tokens: np.ndarray) -> int:
    side = math.isqrt(tokens.shape[1])
    if tokens.ndim != 3 or side * side != tokens.shape[1] or side < 2:
        raise ValueError(f"tokens: expected [N,T,Z] on a square grid, got {list(tokens.shape)}")
    return side


def _distances(side: int) -> np.ndarray:
    """Manhattan distances [T,T] of the places of a grid."""
    place = np.stack(np.divmod(np.arange(side * side), side), 1)
    return np.abs(place[:, None] - place[None]).sum(-1)
