"""Keyed randomness: a value is a function of (seed, stream, step, sample, element) alone.

There is no state to save, to restore or to keep in step between ranks: whoever needs the noise of
sample 17 at step 400 computes it. The batch it sits in, the number of ranks, the device and what
was drawn before make no difference, so a resumed or re-partitioned run sees the same randomness.

The generator is Philox4x32-10 and normals are Box-Muller, in arithmetic that is rounded alike
everywhere and that never waits for the device: equal keys give equal bits on a CPU and on a GPU
(`fastrepa_kernels.keyed_random` has the layout of the key, and the kernel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from fastrepa.errors import ConfigError
from fastrepa_kernels import keyed_random


class Stream(IntEnum):
    """Names what a draw is for; streams share no value. Its numbers are part of a run."""

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
        """Draw `count` raw 32-bit words per sample: [B, count], int64."""
        return keyed_random("words", self.seed, stream, step, samples, count, torch.int64)

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
        return self._shaped("normal", stream, step, samples, shape, dtype)

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
        return self._shaped("uniform", stream, step, samples, shape, dtype)

    def _shaped(
        self,
        draw: str,
        stream: int,
        step: int | Tensor,
        samples: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        values = keyed_random(draw, self.seed, stream, step, samples, math.prod(shape), dtype)
        return values.reshape(len(samples), *shape)
