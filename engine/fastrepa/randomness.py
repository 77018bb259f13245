"""Keyed randomness: a value is a function of (seed, stream, step, sample, element) alone.

There is no state to save, to restore or to keep in step between ranks: whoever needs the noise of
sample 17 at step 400 computes it. The batch it sits in, the number of ranks, the device and what
was drawn before make no difference, so a resumed or re-partitioned run sees the same randomness.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011), which turns a 128-bit counter under a 64-bit key into four 32-bit words:

    key      the seed
    word 0   block of four elements, element // 4
    word 1   sample, its low 32 bits
    word 2   step
    word 3   stream (8 bits), then the sample's high 24 bits

Everything is torch integer and float64 arithmetic that never waits for the device. Normals are
Box-Muller with logarithm, square root, sine and cosine written out in sums, products and quotients,
because those alone are rounded alike everywhere (IEEE 754): torch's own functions differ in the
last place between processors and libraries, and on x86 its square root does, too. Eagerly run,
equal keys give equal bits; a compiler that contracts a*b+c may change the last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from fastrepa.errors import ConfigError

_WORD = 0xFFFFFFFF
# Philox4x32 multipliers less 2^32: with a 32-bit word the product then fits in a signed 64-bit.
_MULTIPLIER_0 = 0xD2511F53 - 2**32
_MULTIPLIER_1 = 0xCD9E8D57 - 2**32
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# log(m) = 2 s (1 + s^2/3 + s^4/5 + ...) with s = (m-1)/(m+1): |s| < 0.172, last term below 2e-17.
_LOG = tuple(2.0 / (2 * k + 1) for k in range(11))
# Taylor series on [-pi/4, pi/4]: the last terms are below 5e-17.
_SIN = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(9))
_COS = tuple((-1) ** k / math.factorial(2 * k) for k in range(10))


class Stream(IntEnum):
    """What a draw is for; streams share no value. The numbers are part of a run's identity."""

    LATENT = 0
    """The posterior sample of an autoencoder's latent."""
    NOISE = 1
    """The noise that a training sample is mixed with."""
    TIME = 2
    """A training sample's time."""
    LABEL_DROP = 3
    """Whether a training sample's label is dropped."""
    SAMPLE_NOISE = 4
    """What a generated image starts from."""
    SAMPLE_STEP = 5
    """The noise of a stochastic sampler's steps."""
    FLIP = 6
    """Whether a training sample is mirrored."""


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words (0 <= word < 2^32), of any one shape.

    Source: Salmon et al. 2011; agrees with the known answers of their Random123 library.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        # (M - 2^32) c = M c - 2^32 c: same low word, and a high word that is short of c.
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


class KeyedRandom:
    """Random values by key.

    `samples` is an int64 tensor [B] of sample numbers, 0 <= sample < 2^56, and its device is the
    result's; `step` is an integer, 0 <= step < 2^32, or a 0-d int64 tensor on that device. Element
    e of a sample's values does not depend on how many elements are asked for.

    Raises `ConfigError` for a seed outside 0 .. 2^64 - 1, ValueError for another key out of range
    and TypeError for sample numbers that are not int64. (Tensors' values are not looked at: that
    would wait for the device.)
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed: {seed} is not in 0 .. 2^64 - 1")
        self.seed = seed

    def __repr__(self) -> str:
        return f"KeyedRandom({self.seed})"

    def words(self, stream: int, step: int | Tensor, samples: Tensor, count: int) -> Tensor:
        """`count` raw 32-bit words per sample: [B, count], int64."""
        return torch.stack(self._blocks(stream, step, samples, -(-count // 4)), -1).flatten(1)[
            :, :count
        ]

    def normal(
        self,
        stream: int,
        step: int | Tensor,
        samples: Tensor,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Standard normal values [B, *shape]; float32 ones are the float64 ones, rounded.

        The largest possible magnitude is 6.76 (the smallest radius is 2^-33).
        """
        count = math.prod(shape)
        w0, w1, w2, w3 = self._blocks(stream, step, samples, -(-count // 4))
        pairs = (*_box_muller(w0, w1), *_box_muller(w2, w3))
        values = torch.stack(pairs, -1).flatten(1)[:, :count]
        return values.reshape(samples.shape[0], *shape).to(dtype)

    def uniform(
        self,
        stream: int,
        step: int | Tensor,
        samples: Tensor,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Uniform values [B, *shape] in the OPEN interval (0, 1): neither end can occur.

        They are the midpoints of 2^23 (float32) or 2^52 (float64) equal cells; both dtypes give
        the same value to float32's resolution. Other dtypes raise TypeError.
        """
        count = math.prod(shape)
        w0, w1, w2, w3 = self._blocks(stream, step, samples, -(-count // 2))
        high = torch.stack((w0, w2), -1).flatten(1)[:, :count]
        if dtype == torch.float32:
            cells = ((high >> 9).double() + 0.5) * 2.0**-23
        elif dtype == torch.float64:
            low = torch.stack((w1, w3), -1).flatten(1)[:, :count]
            cells = (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52
        else:
            raise TypeError(f"dtype: {dtype} is neither torch.float32 nor torch.float64")
        return cells.reshape(samples.shape[0], *shape).to(dtype)

    def _blocks(
        self, stream: int, step: int | Tensor, samples: Tensor, blocks: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four words of every block, each [B, blocks] int64."""
        if samples.dtype != torch.int64 or samples.dim() != 1:
            raise TypeError(
                f"samples: expected int64 [B], got {samples.dtype} {list(samples.shape)}"
            )
        if not 0 <= stream < 2**8:
            raise ValueError(f"stream: {stream} is not in 0 .. 255")
        if isinstance(step, int) and not 0 <= step < 2**32:
            raise ValueError(f"step: {step} is not in 0 .. 2^32 - 1")
        if blocks > 2**32:
            raise ValueError(f"shape: {4 * blocks} elements a sample are more than 2^34")
        sample = samples[:, None]
        block = torch.arange(blocks, device=samples.device)[None, :]
        zero = torch.zeros_like(sample) + torch.zeros_like(block)
        counter = (
            zero + block,
            zero + (sample & _WORD),
            zero + step,
            zero + ((sample >> 32) | (int(stream) << 24)),
        )
        return philox4x32(counter, (self.seed & _WORD, self.seed >> 32))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """c0 + c1 x + c2 x^2 + ... by Horner's rule, one rounding per operation."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive, normal float64 values, to a few 1e-16 relative."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [1/2, 1)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)  # [sqrt(1/2), sqrt(2))
    exponent = exponent.double() - small.double()
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * math.log(2.0) + s * _polynomial(s * s, _LOG)


def _sqrt(x: Tensor) -> Tensor:
    """Square root of positive, normal float64 values, to a few 1e-16 relative."""
    mantissa, exponent = torch.frexp(x)
    half = exponent.long() >> 1
    mantissa = torch.where(exponent & 1 == 1, mantissa * 2.0, mantissa)  # [1/2, 2)
    root = mantissa * 0.485 + 0.485  # within 3%; Heron's rule squares the error four times
    for _ in range(4):
        root = (root + mantissa / root) * 0.5
    return root * ((half + 1023) << 52).view(torch.float64)  # 2^half, by its bits


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float64) from two 32-bit words per element."""
    u = (radius.double() + 0.5) * 2.0**-32  # open interval: the logarithm is finite
    r = _sqrt(_log(u) * -2.0)
    # The low 30 bits pick a point on the quarter circle around angle 0, symmetric about it;
    # bit 30 mirrors it at the diagonal and bit 31 at the origin, which covers the circle evenly.
    a = ((angle & 0x3FFFFFFF).double() - (2.0**29 - 0.5)) * (math.pi * 2.0**-31)
    square = a * a
    cosine, sine = _polynomial(square, _COS), a * _polynomial(square, _SIN)
    mirrored = (angle >> 30) & 1 == 1
    r = torch.where(angle >> 31 == 1, -r, r)
    return r * torch.where(mirrored, sine, cosine), r * torch.where(mirrored, cosine, sine)
