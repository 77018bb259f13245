"""Distances of two sets of images, from their features: pure functions in float64.

Frechet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018), precision and recall
(Kynkaanniemi et al. 2019), Inception Score (Salimans et al. 2016) and CLIP score (Hessel et al.
2021). Which network the features come from is the caller's matter: only on Inception's do the
first two go by the names FID and KID.

N, M images, D width of a feature. Definitions, subsets and their seeds are torch-fidelity's
(Obukhov et al. 2020), whose numbers these are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
INCEPTION_SPLITS = 10
NEIGHBOURS = 3
SEED = 2020  # torch-fidelity's, of subsets and shuffles
BLOCK = 1024  # rows of a distance matrix that stand in memory at once
CLIP_WEIGHT = 100.0  # the score is 100 max(cosine, 0), as torchmetrics and the field give it


@dataclass
class Moments:
    """Mean and covariance of features, taken in float64 mergeable (Chan et al. 1979).

    `mean` [D]; `scatter` [D,D]: the sum of outer products of deviations from the mean.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        mean = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, mean, mean.new_zeros(width, width))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Take the moments of features [N,D] of any float dtype, N > 0."""
        x = features.double()
        mean = x.mean(0)
        deviations = x - mean
        return cls(len(x), mean, deviations.T @ deviations)

    @property
    def covariance(self) -> Tensor:
        """The covariance [D,D], divided by N - 1. Raises ValueError for less than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two features, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add features [N,D]."""
        if len(features):
            self.merge(Moments.of(features.to(self.mean.device)))

    def merge(self, other: Moments) -> None:
        """Add what another has seen."""
        if not other.count:
            return
        total = self.count + other.count
        shift = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total

    def merge_ranks(self) -> None:
        """Merge what all ranks have seen, on all of them (collective, over the default group)."""
        share = self.count * self.mean
        seen = torch.tensor([self.count], dtype=torch.float64, device=share.device)
        for part in (seen, share):
            dist.all_reduce(part)
        total = int(seen)
        if not total:
            return
        mean = share / total
        shift = self.mean - mean
        self.scatter += self.count * torch.outer(shift, shift)
        dist.all_reduce(self.scatter)
        self.count, self.mean = total, mean


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: means [D], covariances [D,D], any float dtype.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) (Dowson and Landau 1982). With S = F F^T
    from the eigenvalues, that last trace is the sum of the singular values of F1^T F2: symmetric,
    real, and as exact for the rank-deficient covariances of few images as for any other.

    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or mu1.dim() != 1:
        raise ValueError(
            f"mu {list(mu1.shape)} and {list(mu2.shape)}, "
            f"sigma {list(sigma1.shape)} and {list(sigma2.shape)} do not fit"
        )
    if not all(bool(x.isfinite().all()) for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite")
    return _distance((mu1, _factor(sigma1)), (mu2, _factor(sigma2)))


def frechet_bias(features: Tensor, mu: Tensor, sigma: Tensor) -> float:
    """Estimate by how much the distance of features [N,D] to a Gaussian is too great; N >= 4.

    With N images it is the true one plus c / N + O(1 / N^2) (Chong and Forsyth 2020), so half of
    them add what all of them add once more: the halves' mean distance less that of the whole.
    """
    order = torch.from_numpy(np.random.RandomState(SEED).permutation(len(features)))
    reference = (mu.double(), _factor(sigma.double()))

    def distance(part: Tensor) -> float:
        deviations = part - part.mean(0)
        return _distance((part.mean(0), deviations.T / (len(part) - 1) ** 0.5), reference)

    x = features.double().cpu()
    halves = [distance(x[half]) for half in order.chunk(2)]
    return max(0.0, sum(halves) / 2 - distance(x))


def _distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Return the distance of two Gaussians given as mean [D] and factor [D,r] of the covariance."""
    (mu1, factor1), (mu2, factor2) = a, b
    traces = factor1.square().sum() + factor2.square().sum()
    overlap = torch.linalg.svdvals(factor1.T @ factor2).sum()
    distance = (mu1 - mu2).square().sum() + traces - 2 * overlap
    return max(0.0, distance.item())  # rounding may leave the least below nothing


def _factor(sigma: Tensor) -> Tensor:
    """F [D,r] with F F^T = sigma [D,D] symmetric, without eigenvalues that are rounding alone."""
    values, vectors = torch.linalg.eigh(sigma)
    least = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    kept = values > least
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = SEED,
    progress: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Return (mean, deviation) over subsets of the unbiased squared MMD, kernel (x.y / D + 1)^3.

    samples [N,D], reference [M,D]. Subsets have `subset_size` features of each set, or as many as
    the smaller one has. It has no bias, so it may come out a little below zero.
    Raises ValueError for sets of less than two.
    """
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"a kernel distance needs two features of each, got {size}")
    rng = np.random.RandomState(seed)  # torch-fidelity's subsets
    found = []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), size, replace=False)].double()
        y = reference[rng.choice(len(reference), size, replace=False)].double()
        found.append(_squared_mmd(x, y))
        progress()
    return float(np.mean(found)), float(np.std(found))


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared MMD of x [m,D] and y [m,D]."""
    m, width = x.shape
    within = 0.0
    for z in (x, y):
        kernel = (z @ z.T / width + 1) ** 3
        within += (kernel.sum() - kernel.trace()).item()
    across = ((x @ y.T / width + 1) ** 3).sum().item()
    return within / (m * (m - 1)) - 2 * across / m**2


def inception_score(
    logits: Tensor, *, splits: int = INCEPTION_SPLITS, seed: int = SEED
) -> tuple[float, float]:
    """Return (mean, deviation) over splits of exp(mean KL(p(y|x) || p(y))), of logits [N,K].

    The images are shuffled first. With less images than splits there is one split an image, whose
    score is 1. Raises ValueError for none.
    """
    n = len(logits)
    if not n:
        raise ValueError("an Inception Score of no images")
    order = np.random.RandomState(seed).permutation(n)  # and its shuffle
    log_p = logits[order].double().log_softmax(1)
    scores, splits = [], min(splits, n)
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        marginal = part.exp().mean(0)
        # Where a class is impossible to the last bit, 0 log 0 is 0.
        divergence = (part.exp() * (part - marginal.log())).nan_to_num(0.0).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    samples: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of samples [N,D] inside the reference's manifold, and of reference [M,D] inside theirs.

    A set's manifold is the union of balls around its features, each as wide as the distance to the
    `neighbours`-th nearest other one. Raises ValueError for a set of no more than `neighbours`.
    """
    least = min(len(samples), len(reference))
    if least <= neighbours:
        raise ValueError(
            f"precision and recall need {neighbours + 1} features of each, got {least}"
        )
    x, y = samples.double(), reference.double()
    return _covered(x, y, neighbours), _covered(y, x, neighbours)


def _covered(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of points [N,D] within the manifold of [M,D]."""
    radius = torch.cat([
        torch.cdist(rows, manifold).kthvalue(neighbours + 1).values  # the nearest is itself
        for rows in manifold.split(BLOCK)
    ])  # fmt: skip
    inside = [(torch.cdist(rows, manifold) <= radius).any(1) for rows in points.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean of 100 max(cosine, 0) of image embeddings [N,D] with their texts' [N,D]."""
    cosine = torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=1)
    return CLIP_WEIGHT * cosine.clamp(min=0).mean().item()
