"""Classes told apart by a representation: a linear probe in closed form, and neighbours.

Pure functions of numpy arrays, computed in float64. N images, D feature width, C classes, labels
0 .. C-1. Accuracies are balanced: the mean over classes of the share that is right, so that a large
class counts no more than a small one.

    ridge_probe   one-hot ridge regression (Hoerl and Kennard 1970) on standardised features
    knn_probe     the cosine-weighted vote of the nearest neighbours (Wu et al. 2018)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastrepa.commands.probe.similarity import unit_rows

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # where rows have a mean square length near 1
NEIGHBOURS = 10
FOLDS = 5

Classifier = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def ridge_probe(
    train: np.ndarray, labels: np.ndarray, groups: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """The class [M] of every row of test [M,D], by ridge regression on train [N,D], labels [N].

    Minimises sum_i w_i |y_i - b - W x_i|^2 + penalty |W|^2 in closed form, x standardised with the
    training rows' mean and deviation, y one-hot, w_i such that classes weigh the same. The penalty
    is the best of PENALTIES in FOLDS folds of the training rows by `groups` [N].
    """
    given, fold = np.unique(labels), folds_of(groups, FOLDS)
    errors = np.zeros(len(PENALTIES))
    for held in np.unique(fold):
        fit, rest = fold != held, fold == held
        if len(np.unique(labels[fit])) < 2:
            continue
        truth = labels[rest][:, None] == given
        weight = _balanced(labels[rest])[:, None]
        found = _ridge(train[fit], labels[fit], train[rest], given, PENALTIES)
        errors += [(weight * (scores - truth) ** 2).sum() for scores in found]
    best = PENALTIES[int(errors.argmin())]
    (scores,) = _ridge(train, labels, test, given, (best,))
    return given[scores.argmax(1)]


def knn_probe(
    train: np.ndarray, labels: np.ndarray, groups: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """The class [M] of every row of test [M,D] by its nearest NEIGHBOURS in train [N,D].

    Nearness is the cosine of rows less the training rows' mean; a neighbour's vote weighs by it (0
    at least), and by the inverse of its class's share of the training rows. `groups` is not used.
    """
    mean = train.mean(0)
    a, b = unit_rows(test - mean), unit_rows(train - mean)
    cosine = a @ b.T
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS]
    given = np.unique(labels)
    weight = _balanced(labels)[near] * np.clip(np.take_along_axis(cosine, near, 1), 1e-9, None)
    votes = np.stack([(weight * (labels[near] == c)).sum(1) for c in given], 1)
    return given[votes.argmax(1)]


def cross_validated(
    probe: Classifier, x: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, repeats: int = 1
) -> np.ndarray:
    """Return how often a probe of other groups' rows tells each row of x [N,D] right: [N], 0..1.

    FOLDS folds, dealt anew in each of the repeats; rows of one group are never on both sides.
    """
    x = np.asarray(x, dtype=np.float64)
    right = np.zeros(len(x))
    for repeat in range(repeats):
        fold = folds_of(groups, FOLDS, seed=repeat)
        for held in np.unique(fold):
            fit, rest = fold != held, fold == held
            found = probe(x[fit], labels[fit], groups[fit], x[rest])
            right[rest] += found == labels[rest]
    return right / repeats


def balanced_accuracy(right: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of the mean of right [N] in it."""
    return float((_balanced(labels) * right).sum())


def gain(
    right: np.ndarray, control: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[float, float]:
    """Balanced accuracy above a control's on the same images, and its standard error.

    right, control [N]: 0..1 each. The error is that of the choice of images, paired image by image
    and counting a group as one: the root of the sum over groups of their squared share of the sum.
    """
    difference = right - control
    mean = np.array([difference[labels == c].mean() for c in range(labels.max() + 1)
                     if (labels == c).any()])  # fmt: skip
    place = np.unique(labels, return_inverse=True)[1]
    share = _balanced(labels) * (difference - mean[place])
    by_group = np.bincount(np.unique(groups, return_inverse=True)[1], weights=share)
    return float((_balanced(labels) * difference).sum()), float(np.sqrt((by_group**2).sum()))


def folds_of(groups: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """A fold 0 .. folds-1 for each row, whole groups at a time, sizes as even as the groups allow.

    Groups are dealt by size, equals in an order drawn from `seed`, each to the smallest fold.
    """
    names, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    draw = np.random.Philox(key=key).random_raw(len(names))
    fold_of_group, filled = np.zeros(len(names), dtype=np.int64), np.zeros(folds)
    for group in np.lexsort((draw, -sizes)):
        fold_of_group[group] = filled.argmin()
        filled[fold_of_group[group]] += sizes[group]
    return fold_of_group[place]


def _ridge(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    classes: np.ndarray,
    penalties: tuple[float, ...],
) -> list[np.ndarray]:
    """Scores [M,C] of the test rows for each penalty: one eigendecomposition serves all of them."""
    weight = _balanced(labels)
    weight = weight / weight.sum()
    root = np.sqrt(weight)[:, None]
    mean = weight @ train
    deviation = np.sqrt(weight @ (train - mean) ** 2)
    scale = np.where(deviation > 1e-12 * np.abs(mean).max(initial=1.0), deviation, np.inf)
    # Over the root of D: a row's square length is about 1, so penalties mean the same for any D.
    scale = scale * np.sqrt(train.shape[1])
    a, b = root * (train - mean) / scale, (test - mean) / scale
    hot = (labels[:, None] == classes).astype(np.float64)
    centre = weight @ hot
    y = root * (hot - centre)
    if a.shape[1] <= a.shape[0]:
        values, vectors = np.linalg.eigh(a.T @ a)
        left, right = b @ vectors, vectors.T @ (a.T @ y)
    else:
        values, vectors = np.linalg.eigh(a @ a.T)
        left, right = (b @ a.T) @ vectors, vectors.T @ y
    values = np.clip(values, 0.0, None)[:, None]
    return [left @ (right / (values + penalty)) + centre for penalty in penalties]


def _balanced(labels: np.ndarray) -> np.ndarray:
    """A weight [N] for each row; every class that is there has the same sum, all have 1."""
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1.0 / (len(counts) * counts[place])
