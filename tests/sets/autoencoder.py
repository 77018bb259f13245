"""Stable Diffusion's autoencoder in small: the real class and layout, a few channels wide."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL


def small_vae(seed: int = 0) -> Any:
    """8x down, 4 latent channels, weights from a seed; a CPU encodes with it in no time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
