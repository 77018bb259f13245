"""The interpolants between data and noise (SiT: Ma et al. 2024, eq. 2-6).

x_t = alpha(t) z + sigma(t) eps, with t = 0 the data z and t = 1 the noise eps; the velocity is
d x_t / dt = alpha'(t) z + sigma'(t) eps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below this time a data prediction's velocity, and its target, divide by sigma(DATA_T_MIN).
DATA_T_MIN = 0.05


def path_coefficients(path: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return alpha, sigma and their time derivatives at t [...], in its shape and float dtype."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        angle = t * (math.pi / 2)
        alpha, sigma = torch.cos(angle), torch.sin(angle)
        return alpha, sigma, -(math.pi / 2) * sigma, (math.pi / 2) * alpha
    raise ValueError(f"path must be 'linear' or 'cosine', got {path!r}")


def velocity_from_data(path: str, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return the velocity at x [B,C,h,w] and t [B] if the clean latent were z [B,C,h,w].

    alpha' z + sigma' (x - alpha z) / sigma, as one quotient whose sigma is at least sigma(0.05);
    (x - z) / max(t, 0.05) on the linear path. Below t = 0.05 that is sigma(t) / sigma(0.05) times
    the velocity, and so must the target be: give it here the true z, and a perfect prediction has
    no error at any t. A network that predicts z, not the velocity, need not carry the noise of
    every pixel through its width; the loss stays on the velocity, its 1 / sigma^2 weight bounded
    (Li and He 2025, "Back to Basics: Let Denoising Generative Models Denoise").
    """
    t = t.view(-1, *[1] * (x.ndim - 1))
    alpha, sigma, d_alpha, d_sigma = path_coefficients(path, t)
    _, clamped, _, _ = path_coefficients(path, t.clamp(min=DATA_T_MIN))
    return (d_sigma * x - (d_sigma * alpha - d_alpha * sigma) * z) / clamped
