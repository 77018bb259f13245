"""The velocity objective of stochastic interpolants (SiT: Ma et al. 2024, eq. 2-6; REPA section 3).

What a sample is mixed with, and how the prediction is scored; `interpolant.py` has the mixtures.
Shapes: B batch, C channels, h and w latent side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrepa.config import ObjectiveConfig
from fastrepa.interpolant import path_coefficients, velocity_from_data


def lognormal_time(path: str, normal: Tensor) -> Tensor:
    """Return t [B] whose noise to signal, sigma/alpha, is exp(normal), normal [B] Gaussian."""
    ratio = normal.exp()
    return ratio / (1 + ratio) if path == "linear" else torch.atan(ratio) * (2 / math.pi)


class Draws(NamedTuple):
    """All that is random in B training samples."""

    latent_noise: Tensor | None  # [B,C,h,w], where the codec's latents are samples
    time: Tensor  # [B]
    noise: Tensor  # [B,C,h,w]
    drop: Tensor  # [B] bool, whose label is dropped


@dataclass(frozen=True)
class Objective:
    """Makes a training example from a clean latent and scores the prediction."""

    config: ObjectiveConfig

    def interpolate(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_t, velocity target), [B,C,h,w] float32, of z and noise [B,C,h,w] and t [B].

        Where the network predicts z, the target is clamped below t = 0.05 as its velocity is.
        """
        t = t.float().view(-1, *[1] * (z.ndim - 1))
        alpha, sigma, d_alpha, d_sigma = path_coefficients(self.config.path, t)
        z, noise = z.float(), noise.float()
        x = alpha * z + sigma * noise
        if self.config.prediction == "data":
            return x, velocity_from_data(self.config.path, x, z, t)
        return x, d_alpha * z + d_sigma * noise

    @staticmethod
    def velocity_loss(velocity: Tensor, target: Tensor) -> Tensor:
        """Mean squared error [] of two [B,C,h,w], over all elements, in float32 (float64 stays)."""
        dtype = torch.promote_types(velocity.dtype, torch.float32)
        return (velocity.to(dtype) - target.to(dtype)).square().mean()
