"""Measures of features: equal to naive loops, and as they should behave."""

import math

import numpy as np
import pytest

from fastrepa.commands.probe.similarity import (
    cknna,
    contrast,
    effective_rank,
    linear_cka,
    local_distant_similarity,
    mean_cosine,
    mean_share,
)

ROUNDING = 1e-10


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def related(seed, n=40, d=12, z=9):
    """Two spaces of the same images that agree in part."""
    x = draw(seed, n, d)
    return x, x @ draw(seed + 1, d, z) + 2 * draw(seed + 2, n, z) + 0.7


def rotation(d, seed=5):
    return np.linalg.qr(draw(seed, d, d))[0]


# Naive implementations, entry by entry --------------------------------------------------------


def cosine(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True)) / (
        math.sqrt(sum(p * p for p in a)) * math.sqrt(sum(q * q for q in b))
    )


def unbiased_hsic(k, l):  # noqa: E741
    """Song et al. 2012, eq. 5."""
    n = len(k)
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    trace = sum(k[i][j] * l[j][i] for i, j in off)
    total = sum(k[i][j] for i, j in off) * sum(l[i][j] for i, j in off)
    product = sum(k[i][j] * l[j][m] for i, j in off for m in range(n) if m != j)  # 1' K L 1
    return (trace + total / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3))


def naive_cknna(x, y, k):
    n = len(x)
    kernels, near = [], []
    for space in (x, y):
        kernel = [[cosine(space[i], space[j]) for j in range(n)] for i in range(n)]
        kernels.append(kernel)
        near.append([
            set(sorted((j for j in range(n) if j != i), key=lambda j: -kernel[i][j])[:k])
            for i in range(n)
        ])  # fmt: skip

    def masked(space, *spaces):
        return [
            [kernels[space][i][j] if all(j in near[s][i] for s in spaces) else 0.0
             for j in range(n)]
            for i in range(n)
        ]  # fmt: skip

    xy = unbiased_hsic(masked(0, 0, 1), masked(1, 0, 1))
    xx, yy = (unbiased_hsic(masked(s, s), masked(s, s)) for s in (0, 1))
    return xy / math.sqrt(xx * yy)


def biased_cka(x, y):
    """Kornblith et al. 2019, by the biased HSIC of centred kernels: tr(K H L H)."""
    h = np.eye(len(x)) - 1 / len(x)
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h  # noqa: E741
    return np.sum(k * l) / math.sqrt(np.sum(k * k) * np.sum(l * l))


@pytest.mark.parametrize(("seed", "k"), [(0, 2), (10, 5), (20, 10), (30, 35)])
def test_cknna_is_the_naive_one(seed, k):
    x, y = related(seed)
    assert cknna(x, y, k) == pytest.approx(naive_cknna(x, y, k), abs=ROUNDING)


@pytest.mark.parametrize("shape", [(40, 12, 9), (14, 20, 9)])  # more rows than columns, and fewer
def test_linear_cka_is_the_naive_one(shape):
    x, y = related(3, *shape)
    kernels = []
    for space in (x - x.mean(0), y - y.mean(0)):
        kernels.append([[float(a @ b) for b in space] for a in space])
    k, l = kernels  # noqa: E741
    hsic = unbiased_hsic(k, l) / math.sqrt(unbiased_hsic(k, k) * unbiased_hsic(l, l))
    assert linear_cka(x, y) == pytest.approx(hsic, abs=ROUNDING)


@pytest.mark.parametrize("measure", [cknna, linear_cka])
def test_of_itself_1_and_blind_to_rotation_and_scale(measure):
    x, y = related(7, n=120)
    assert measure(x, x) == pytest.approx(1, abs=ROUNDING)
    turned = measure(3.5 * x @ rotation(12), 0.2 * y @ rotation(9))
    assert turned == pytest.approx(measure(x, y), abs=ROUNDING)
    assert 0.05 < measure(x, y) < 0.95
    stretched = x * np.linspace(0.1, 10, 12)
    assert abs(measure(stretched, y) - measure(x, y)) > 1e-3  # not to anything linear


def test_of_unrelated_features_near_0():
    found = [
        (cknna(x, y), linear_cka(x, y), biased_cka(x, y))
        for seed in range(8)
        for x, y in [(draw(seed, 150, 100), draw(100 + seed, 150, 100))]
    ]
    mean = np.mean(found, 0)
    assert 0.03 < mean[0] < 10 / 150  # k / N, as neighbours are shared by chance
    assert cknna(draw(0, 1000, 50), draw(1, 1000, 50)) < 0.01
    assert abs(mean[1]) < 0.03
    assert mean[2] > 0.3  # why the debiased one is what a probe reports


def test_more_in_common_is_more():
    x = draw(0, 200, 20)
    noise = draw(1, 200, 20)
    for measure in (cknna, linear_cka):
        values = [measure(x, x + share * noise) for share in (0, 0.3, 1, 3)]
        assert values == sorted(values, reverse=True)


def test_a_space_without_structure_has_no_value():
    assert math.isnan(linear_cka(np.ones((20, 3)), draw(0, 20, 3)))


@pytest.mark.parametrize(("x", "y", "k", "words"), [
    (draw(0, 5, 2), draw(0, 6, 2), 2, "expected"),
    (draw(0, 3, 2), draw(0, 3, 2), 2, "at least 4"),
    (draw(0, 9, 2), draw(0, 9, 2), 9, "not in 2..8"),
])  # fmt: skip
def test_what_cannot_be_compared(x, y, k, words):
    with pytest.raises(ValueError, match=words):
        cknna(x, y, k)


def test_effective_rank():
    for rank in (1, 3, 7):
        orthogonal = np.linalg.qr(draw(rank, 50, 20))[0][:, :rank] @ rotation(20)[:rank]
        assert effective_rank(orthogonal) == pytest.approx(rank, rel=1e-6)
        assert effective_rank(orthogonal.T) == pytest.approx(rank, rel=1e-6)
    x = draw(2, 30, 6)
    p = np.linalg.svd(x, compute_uv=False)
    p = p / p.sum()
    assert effective_rank(x) == pytest.approx(math.exp(-sum(a * math.log(a) for a in p)))
    assert effective_rank(np.zeros((4, 3))) == 0


def test_collapse():
    x = draw(0, 60, 8)
    naive = np.mean([cosine(x[i], x[j]) for i in range(60) for j in range(60) if i != j])
    assert mean_cosine(x) == pytest.approx(naive, abs=ROUNDING)
    assert abs(mean_share(x)) < 0.1
    assert mean_share(x + 100) > 0.99 and mean_cosine(x + 100) > 0.99
    assert mean_share(x - x.mean(0)) == pytest.approx(0, abs=ROUNDING)


@pytest.mark.parametrize(("side", "distant"), [(4, 2), (8, 3), (14, 5)])
def test_spatial_structure_is_the_naive_one(side, distant):
    tokens = draw(side, 2 if side < 14 else 1, side * side, 3) + 0.5
    expected = []
    for image in tokens:
        near, far = [], []
        for a in range(side * side):
            for b in range(side * side):
                apart = abs(a // side - b // side) + abs(a % side - b % side)
                if apart == 1:
                    near.append(cosine(image[a], image[b]))
                elif apart >= distant:
                    far.append(cosine(image[a], image[b]))
        expected.append(np.mean(near) - np.mean(far))
    assert local_distant_similarity(tokens) == pytest.approx(expected, abs=ROUNDING)
    unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
    spread = [math.sqrt(np.mean([np.sum((t - i.mean(0)) ** 2) for t in i])) for i in unit]
    assert contrast(tokens) == pytest.approx(spread, abs=ROUNDING)


def test_spatial_structure_of_a_smooth_map_and_of_shuffled_tokens():
    place = np.stack(np.divmod(np.arange(64), 8), 1) / 8
    smooth = np.concatenate([np.cos(3 * place), np.sin(3 * place)], 1)[None]
    shuffled = smooth[:, np.random.default_rng(0).permutation(64)]
    assert local_distant_similarity(smooth)[0] > 0.4
    assert abs(local_distant_similarity(shuffled)[0]) < 0.1
    assert contrast(smooth) == pytest.approx(contrast(shuffled))
    same = np.ones((1, 64, 3))
    assert local_distant_similarity(same)[0] == pytest.approx(0, abs=ROUNDING)
    assert contrast(same)[0] == pytest.approx(0, abs=1e-7)


def test_tokens_that_are_no_square():
    with pytest.raises(ValueError, match="square grid"):
        local_distant_similarity(draw(0, 2, 6, 3))
