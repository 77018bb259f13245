"""Distances between sets of features: closed forms, torch-fidelity's own code, and few images."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from fastrepa.commands.evaluate.metrics import (
    Moments,
    clip_score,
    frechet_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def features(n, width, seed, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, width, generator=g) @ mixing / width**0.5 + shift


def distance(x, y):
    a, b = Moments.of(x), Moments.of(y)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_two_gaussians_have_their_closed_form():
    """Commuting covariances: |mu|^2 + sum (sqrt(a) - sqrt(b))^2; one dimension; a scaled copy."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    a, b = rng.uniform(0.1, 5, (2, 40))
    mu1, mu2 = rng.normal(size=(2, 40))
    sigma1, sigma2 = (torch.from_numpy(rotation @ np.diag(v) @ rotation.T) for v in (a, b))
    wanted = ((mu1 - mu2) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    mu1, mu2 = torch.from_numpy(mu1), torch.from_numpy(mu2)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(wanted, rel=1e-10)
    one = torch.tensor([[4.0]])
    assert frechet_distance(torch.ones(1), one, torch.zeros(1), 2.25 * one) == pytest.approx(2.0)
    spread = frechet_distance(mu1, sigma1, mu1, 9 * sigma1)
    assert spread == pytest.approx(4 * a.sum(), rel=1e-10)


@pytest.mark.parametrize("n", [3, 30, 400])  # ranks 2 and 29 in 100 dimensions, and a full one
def test_a_set_is_at_no_distance_from_itself_and_few_images_change_nothing(n):
    x, y = features(n, 100, 1, shift=3.0), features(n, 100, 2)
    assert distance(x, x) < 1e-9
    assert distance(x, x.flip(0)) < 1e-9
    a, b = Moments.of(x), Moments.of(y)
    root = _root(a.covariance)
    middle = np.linalg.eigvalsh(root @ b.covariance.numpy() @ root).clip(0) ** 0.5
    wanted = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    assert distance(x, y) == pytest.approx(wanted.item() - 2 * middle.sum(), rel=1e-6)


def test_the_bias_of_few_images_is_about_what_halves_of_them_say():
    """The true distance is known: the images' own Gaussian against itself, moved by one."""
    many = features(40_000, 16, 1)
    truth = Moments.of(many)
    x = features(100, 16, 2)
    few = Moments.of(x)
    moved = truth.mean + 0.25
    found = frechet_distance(few.mean, few.covariance, moved, truth.covariance)
    excess = found - frechet_distance(truth.mean, truth.covariance, moved, truth.covariance)
    assert frechet_bias(x, moved, truth.covariance) == pytest.approx(excess, rel=0.5)


def _root(sigma):
    values, vectors = np.linalg.eigh(sigma.numpy())
    return vectors @ np.diag(values.clip(0) ** 0.5) @ vectors.T


def test_numbers_are_those_of_torch_fidelity():
    x, y = features(300, 24, 1), features(250, 24, 2, shift=0.3)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(x.double()), fid_features_to_statistics(y.double()), False
    )["frechet_inception_distance"]
    assert distance(x, y) == pytest.approx(theirs, rel=1e-9)
    kid = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=7, kid_subset_size=100, verbose=False
    )
    ours = kernel_distance(x, y, subsets=7, subset_size=100)
    assert ours == pytest.approx(tuple(kid.values()), rel=1e-9)
    logits = 2 * features(103, 24, 3)
    assert inception_score(logits) == pytest.approx(
        tuple(isc_features_to_metric(logits).values()), rel=1e-12
    )
    prc = prc_features_to_metric(x.double(), y.double(), verbose=False)
    assert precision_recall(x, y) == (pytest.approx(prc["precision"]), pytest.approx(prc["recall"]))
    assert 0 < prc["precision"] < 1
    assert prc["precision"] != prc["recall"]


def test_few_images_are_enough_or_refused_by_number():
    x = features(20, 8, 1)
    assert kernel_distance(x, features(30, 8, 2), subsets=3)[1] >= 0
    for score in (kernel_distance, precision_recall):
        with pytest.raises(ValueError, match="got 1"):
            score(x[:1], x)
    assert inception_score(x[:4]) == (1.0, 0.0)  # an image a split: no spread of classes to see
    certain = 100 * torch.eye(10).repeat(10, 1) - 50  # ten classes, each certain
    assert inception_score(certain, splits=1)[0] == pytest.approx(10)
    with pytest.raises(ValueError, match="needs two features, got 1"):
        _ = Moments.of(x[:1]).covariance
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(x[0] * math.nan, torch.eye(8), x[0], torch.eye(8))
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(x[0], torch.eye(8), x[0], torch.eye(9))


def test_moments_in_parts_are_those_of_the_whole_far_from_the_origin():
    x = features(101, 12, 1).double() + 1e6
    parts, empty = Moments.empty(12), Moments.empty(12)
    for part in x.split(17):
        parts.update(part)
    parts.update(x[:0])
    parts.merge(empty)
    empty.merge(parts)
    for moments in (parts, empty):
        assert moments.count == 101
        assert torch.allclose(moments.mean, x.mean(0), rtol=1e-15)
        assert torch.allclose(moments.covariance, torch.cov(x.T), rtol=1e-8, atol=1e-9)


def test_clip_score():
    images, texts = torch.eye(4), torch.tensor([[1.0, 0, 0, 0], [3, 4, 0, 0], [0, 0, -1, 0]])
    assert clip_score(images[:3], texts) == pytest.approx(100 * (1 + 0.8 + 0) / 3)
