"""Probes of classes: the closed form, splits that keep groups whole, and honest errors."""

import numpy as np
import pytest

from fastrepa.commands.probe import separability
from fastrepa.commands.probe.duplicates import (
    HASH_BITS,
    alike_by_features,
    alike_by_hash,
    difference_hash,
    groups_of,
)
from fastrepa.commands.probe.separability import (
    balanced_accuracy,
    cross_validated,
    folds_of,
    gain,
    knn_probe,
    ridge_probe,
)


def classes(seed, counts=(40, 40, 40), d=10, apart=1.5):
    """Return x [N,D] around a centre for each class, and labels [N]."""
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = np.random.default_rng(99).normal(size=(len(counts), d)) * apart
    return centres[labels] + draw.normal(size=(len(labels), d)), labels


@pytest.mark.parametrize("d", [6, 90])  # fewer columns than rows, and more
def test_ridge_is_the_normal_equations(d, monkeypatch):
    penalty = 0.03
    monkeypatch.setattr(separability, "PENALTIES", (penalty,))
    x, labels = classes(0, (30, 12, 8), d, apart=0.4)
    test, _ = classes(1, (30, 12, 8), d, apart=0.4)
    weight = np.array([1 / (3 * (labels == label).sum()) for label in labels])
    # Standardised by the weighted moments, over the root of D; an intercept without a penalty.
    mean = sum(w * row for w, row in zip(weight, x, strict=True))
    deviation = np.sqrt(sum(w * (row - mean) ** 2 for w, row in zip(weight, x, strict=True)))
    scale = deviation * np.sqrt(d)
    a = np.concatenate([(x - mean) / scale, np.ones((50, 1))], 1)
    b = np.concatenate([(test - mean) / scale, np.ones((50, 1))], 1)
    free = np.diag([*[penalty] * d, 0.0])
    y = np.eye(3)[labels]
    w = np.diag(weight)
    expected = b @ np.linalg.solve(a.T @ w @ a + free, a.T @ w @ y)
    (found,) = separability._ridge(x, labels, test, np.arange(3), (penalty,))
    assert found == pytest.approx(expected, abs=1e-9)
    told = ridge_probe(x, labels, np.arange(50), test)
    assert np.array_equal(told, expected.argmax(1))


@pytest.mark.parametrize("probe", [ridge_probe, knn_probe])
def test_probes_tell_what_is_there_and_no_more(probe):
    x, labels = classes(0, apart=2.0)
    groups = np.arange(len(x))
    assert balanced_accuracy(cross_validated(probe, x, labels, groups), labels) > 0.9
    noise = np.random.default_rng(3).normal(size=x.shape)
    found = cross_validated(probe, noise, labels, groups, repeats=3)
    assert abs(balanced_accuracy(found, labels) - 1 / 3) < 0.12


@pytest.mark.parametrize("probe", [ridge_probe, knn_probe])
def test_a_large_class_does_not_swallow_the_small_ones(probe):
    x, labels = classes(1, (300, 20, 20), apart=0.9)
    right = cross_validated(probe, x, labels, np.arange(len(x)))
    for label in range(3):
        assert right[labels == label].mean() > 0.6


def test_copies_on_both_sides_would_be_remembered():
    """Random features, each image there twice: only a split that knows the pairs is honest."""
    x = np.repeat(np.random.default_rng(0).normal(size=(60, 30)), 2, axis=0)
    labels = np.repeat(np.random.default_rng(1).integers(0, 3, 60), 2)
    pairs = np.repeat(np.arange(60), 2)
    remembered = cross_validated(knn_probe, x, labels, np.arange(120))
    honest = cross_validated(knn_probe, x, labels, pairs)
    assert balanced_accuracy(remembered, labels) > 0.55
    assert balanced_accuracy(honest, labels) < 0.48


def test_folds_keep_groups_whole_and_are_even():
    groups = np.random.default_rng(0).integers(0, 40, 200)
    fold = folds_of(groups, 5, seed=1)
    assert all(len(np.unique(fold[groups == group])) == 1 for group in np.unique(groups))
    sizes = np.bincount(fold, minlength=5)
    assert sizes.min() > 0 and sizes.max() - sizes.min() <= 5
    assert np.array_equal(fold, folds_of(groups, 5, seed=1))
    assert not np.array_equal(fold, folds_of(groups, 5, seed=2))


def test_the_error_of_a_gain_covers_the_truth():
    """About 95% of 300 draws of images have the true gain within two errors; groups count once."""
    draw = np.random.default_rng(0)
    labels, groups = np.repeat([0, 1], [60, 180]), np.repeat(np.arange(80), 3)
    inside = {"groups": 0, "images": 0}
    for _ in range(300):
        # Three images of a group are right or wrong together.
        right = np.repeat(draw.random(80) < 0.7, 3)
        control = np.repeat(draw.random(80) < 0.5, 3)
        for name, of in (("groups", groups), ("images", np.arange(240))):
            by, error = gain(right.astype(float), control.astype(float), labels, of)
            inside[name] += abs(by - 0.2) <= 2 * error
    assert 0.91 < inside["groups"] / 300 < 0.99
    assert inside["images"] / 300 < 0.85


def test_nearly_identical_images_are_found_and_others_not():
    draw = np.random.default_rng(0)
    rough = draw.random((12, 9, 9, 3))
    images = (255 * rough.repeat(8, 1).repeat(8, 2)).astype(np.uint8)  # [12,72,72,3]
    brighter = np.clip(images[3].astype(int) + 6, 0, 255).astype(np.uint8)
    smaller = images[7][::2, ::2]
    hashes = np.stack([difference_hash(i) for i in [*images, brighter, smaller]])
    assert hashes.shape[1] == 256
    assert alike_by_hash(hashes).tolist() == [[3, 12], [7, 13]]
    flipped = hashes[:2].copy()
    flipped[1] = flipped[0]
    flipped[1, :HASH_BITS] ^= True
    assert len(alike_by_hash(flipped)) == 1
    flipped[1, HASH_BITS] ^= True
    assert len(alike_by_hash(flipped)) == 0
    tokens = draw.normal(size=(300, 4, 6)) + 50  # their mean is nearly all of them
    tokens[290] = tokens[5] + 0.01
    assert alike_by_features(tokens).tolist() == [[5, 290]]


def test_groups_follow_chains():
    pairs = np.array([[0, 1], [4, 5]]), np.array([[1, 2], [5, 4]])
    group = groups_of(7, *pairs)
    assert len(np.unique(group)) == 4
    assert group[0] == group[1] == group[2] and group[4] == group[5] != group[0]
    assert len(np.unique(groups_of(4, np.array([[0, 1], [2, 3], [1, 3]])))) == 1
    assert len(np.unique(groups_of(3, np.zeros((0, 2), dtype=np.int64)))) == 3
