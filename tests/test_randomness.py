"""Keyed randomness: every part of the key, and statistics.

`tests/kernels/test_keyed_random.py` has Random123's known answers and the bits.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastrepa.errors import ConfigError
from fastrepa.randomness import KeyedRandom, Stream
from tests.kernels.scalar import scalar_box_muller, scalar_philox


def test_the_layout_of_key_and_counter():
    """Runs are compared and resumed across versions: the layout may not drift."""
    seed, step, sample = 0x89ABCDEF_01234567, 0xFEDCBA98, 0xABCDEF_76543210
    words = KeyedRandom(seed).words(Stream.SAMPLE_STEP, step, torch.tensor([sample]), 10)
    expected: list[int] = []
    for block in range(3):
        counter = (block, 0x76543210, 0xFEDCBA98, (5 << 24) | 0xABCDEF)
        expected += scalar_philox(counter, (0x01234567, 0x89ABCDEF))
    assert words.tolist() == [expected[:10]]
    assert [int(s) for s in Stream] == list(range(len(Stream)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (3, 5, 7), (4, 16, 16)])
def test_a_sample_is_the_same_bits_in_any_batch(draw, dtype, shape):
    values = getattr(KeyedRandom(11), draw)
    samples = torch.tensor([5, 0, 2**33 + 5, 17, 2**56 - 1, 18, 19, 20])
    together = values(Stream.NOISE, 4, samples, shape, dtype=dtype)
    assert together.shape == (8, *shape)
    assert together.dtype == dtype
    for size in (1, 3):
        parts = [values(Stream.NOISE, 4, part, shape, dtype=dtype) for part in samples.split(size)]
        assert torch.equal(together, torch.cat(parts))
    order = torch.tensor([7, 2, 4, 0, 1, 3, 6, 5])
    assert torch.equal(together[order], values(Stream.NOISE, 4, samples[order], shape, dtype=dtype))


def test_a_large_draw_has_the_same_bits_whatever_the_threads_and_the_split():
    """Long tensors are cut at thread and vector boundaries, where libm calls would differ."""
    generator = KeyedRandom(3)
    samples = torch.arange(37)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = generator.normal(Stream.NOISE, 1, samples, (3, 33, 31), dtype=torch.float64)
    finally:
        torch.set_num_threads(before)
    torch.set_num_threads(1)
    try:
        rows = [
            generator.normal(Stream.NOISE, 1, s, (3, 33, 31), dtype=torch.float64)
            for s in samples.split(1)
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, torch.cat(rows))


def test_an_element_does_not_depend_on_how_many_are_asked_for():
    generator, samples = KeyedRandom(0), torch.arange(4)
    few = generator.normal(Stream.NOISE, 0, samples, (6,))
    many = generator.normal(Stream.NOISE, 0, samples, (3, 3))
    assert torch.equal(few, many.reshape(4, 9)[:, :6])
    few = generator.uniform(Stream.TIME, 0, samples)
    assert torch.equal(few, generator.uniform(Stream.TIME, 0, samples, (5,))[:, 0])


@pytest.mark.parametrize(
    "other",
    [
        lambda s: KeyedRandom(8).normal(Stream.NOISE, 5, s, (8,)),
        lambda s: KeyedRandom(7 + 2**32).normal(Stream.NOISE, 5, s, (8,)),
        lambda s: KeyedRandom(7).normal(Stream.LATENT, 5, s, (8,)),
        lambda s: KeyedRandom(7).normal(Stream.NOISE, 6, s, (8,)),
        lambda s: KeyedRandom(7).normal(Stream.NOISE, 5, s + 1, (8,)),
        lambda s: KeyedRandom(7).normal(Stream.NOISE, 5, s + 2**32, (8,)),
        lambda s: KeyedRandom(7).normal(Stream.NOISE, 5, s, (16,))[:, 8:],
    ],
    ids=["seed", "seed-high", "stream", "step", "sample", "sample-high", "element"],
)
def test_every_part_of_the_key_matters(other):
    samples = torch.arange(0, 2000, 2)
    base = KeyedRandom(7).normal(Stream.NOISE, 5, samples, (8,))
    changed = other(samples)
    assert (base == changed).float().mean() < 1e-3
    correlation = torch.corrcoef(torch.stack((base.flatten(), changed.flatten())))[0, 1]
    assert abs(float(correlation)) < 4.5 / math.sqrt(base.numel())


def test_the_step_may_live_on_the_device():
    generator, samples = KeyedRandom(2), torch.arange(3)
    expected = generator.normal(Stream.NOISE, 123_456, samples, (5,))
    assert torch.equal(
        expected, generator.normal(Stream.NOISE, torch.tensor(123_456), samples, (5,))
    )


def test_normals_are_box_muller_of_the_words():
    """Against torch's own log, sin and cos: the polynomials are right to the last few places."""
    generator, samples = KeyedRandom(21), torch.arange(64)
    words = generator.words(Stream.NOISE, 9, samples, 64).reshape(64, 16, 4)
    expected = torch.empty(64, 16, 4, dtype=torch.float64)
    for pair in (0, 2):
        u = (words[..., pair].double() + 0.5) / 2**32
        angle = words[..., pair + 1]
        a = ((angle % 2**30).double() + 0.5) / 2**30 * (math.pi / 2) - math.pi / 4
        # bit 30 mirrors at the diagonal, bit 31 at the origin
        a = torch.where((angle >> 30) % 2 == 1, math.pi / 2 - a, a)
        a = torch.where(angle >> 31 == 1, a + math.pi, a)
        radius = (-2 * u.log()).sqrt()
        expected[..., pair] = radius * a.cos()
        expected[..., pair + 1] = radius * a.sin()
    ours = generator.normal(Stream.NOISE, 9, samples, (16, 4), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=2e-14)
    single = generator.normal(Stream.NOISE, 9, samples, (16, 4))
    assert torch.equal(single, ours.float())


def test_normals_have_the_bits_of_plain_ieee_arithmetic():
    """They are equal on every device: no operation but sums, products and quotients."""
    generator, samples = KeyedRandom(40), torch.arange(16)
    words = generator.words(Stream.NOISE, 1, samples, 256).flatten().tolist()
    expected = [
        x for i in range(0, len(words), 2) for x in scalar_box_muller(words[i], words[i + 1])
    ]
    ours = generator.normal(Stream.NOISE, 1, samples, (256,), dtype=torch.float64)
    assert ours.flatten().tolist() == expected


def kolmogorov_smirnov(values: torch.Tensor, cdf: torch.Tensor) -> float:
    """Return sqrt(n) times the largest gap between the empirical distribution of values and cdf."""
    n = values.numel()
    order = values.argsort()
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    gap = torch.maximum(ranks / n - cdf[order], cdf[order] - (ranks - 1) / n)
    return float(gap.max()) * math.sqrt(n)


def test_normals_are_normal():
    x = KeyedRandom(1234).normal(Stream.NOISE, 77, torch.arange(1000), (400,), dtype=torch.float64)
    flat = x.flatten()
    n = flat.numel()
    # Five standard errors of each moment's estimate for a standard normal.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((flat**power).mean()) - mean) < 5 * math.sqrt(variance / n), power
    # 1.95: exceeded once in a thousand; the four outputs of a block each, then all together
    for part in (*x.reshape(-1, 4).unbind(1), flat):
        cdf = 0.5 * (1 + torch.erf(part / math.sqrt(2)))
        assert kolmogorov_smirnov(part, cdf) < 1.95
    # the four outputs of a block are uncorrelated, in value and in magnitude
    lanes = x.reshape(-1, 4)
    for values in (lanes, lanes.square()):
        off_diagonal = torch.corrcoef(values.T) - torch.eye(4)
        assert off_diagonal.abs().max() < 5 / math.sqrt(lanes.shape[0])
    for shifted in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
        a, b = (part.flatten() for part in shifted)
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_uniform(dtype):
    x = KeyedRandom(99).uniform(Stream.TIME, 3, torch.arange(200_000), dtype=dtype).double()
    assert kolmogorov_smirnov(x, x) < 1.95
    assert kolmogorov_smirnov(x * 1024 % 1, x * 1024 % 1) < 1.95  # the lower digits, too
    neighbours = torch.corrcoef(torch.stack((x[1:], x[:-1])))[0, 1]
    assert abs(float(neighbours)) < 5 / math.sqrt(x.numel())


def test_both_dtypes_agree_on_a_uniform():
    samples = torch.arange(1000)
    single = KeyedRandom(5).uniform(Stream.TIME, 0, samples)
    double = KeyedRandom(5).uniform(Stream.TIME, 0, samples, dtype=torch.float64)
    assert (single.double() - double).abs().max() <= 2.0**-24


def test_empty_draws():
    generator = KeyedRandom(0)
    empty = torch.empty(0, dtype=torch.int64)
    assert generator.normal(Stream.NOISE, 0, empty, (3, 4)).shape == (0, 3, 4)
    assert generator.uniform(Stream.TIME, 0, empty).shape == (0,)
    assert generator.normal(Stream.NOISE, 0, torch.arange(2), (0, 4)).shape == (2, 0, 4)


def test_keys_out_of_range_are_named():
    generator, samples = KeyedRandom(0), torch.arange(2)
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match=f"seed: {seed} "):
            KeyedRandom(seed)
    with pytest.raises(ValueError, match="step: -1 "):
        generator.normal(Stream.NOISE, -1, samples)
    with pytest.raises(ValueError, match="step: 4294967296 "):
        generator.uniform(Stream.TIME, 2**32, samples)
    with pytest.raises(ValueError, match="stream: 256 "):
        generator.normal(256, 0, samples)
    with pytest.raises(TypeError, match="samples: expected int64"):
        generator.normal(Stream.NOISE, 0, samples.int())
    with pytest.raises(TypeError, match=r"dtype: torch\.float16"):
        generator.uniform(Stream.TIME, 0, samples, dtype=torch.float16)


@pytest.mark.gpu
def test_cpu_and_gpu_give_the_same_bits():
    generator, samples = KeyedRandom(6), torch.arange(257)
    for dtype in (torch.float32, torch.float64):
        host = generator.normal(Stream.NOISE, 2, samples, (4, 33, 31), dtype=dtype)
        device = generator.normal(Stream.NOISE, 2, samples.cuda(), (4, 33, 31), dtype=dtype)
        assert torch.equal(host, device.cpu())
