"""The networks that stay as they are, encoders and codec, as functions to count and to trace: how
each is built without weights, and how training runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from fastrepa.config import DataConfig, VisionConfig
from fastrepa.model.flops import counted_flops
from fastrepa.vision.codec import SD_VAE_CHANNELS, SD_VAE_DOWN, random_sd_vae
from fastrepa.vision.features import EncoderPlan, cut, feature_map


def frozen_flops(
    data: DataConfig, vision: VisionConfig, plans: Sequence[EncoderPlan], *, cached_latents: bool
) -> int:
    """FLOPs per image of the forwards of encoders and codec, where training runs them."""
    runs = []
    if not vision.cached_targets:
        runs += [encoder_network(plan) for plan in plans]
    if data.codec.is_autoencoder and not cached_latents:
        runs.append((random_sd_vae, encoding(data.resolution)))
    return sum(counted_flops(build, partial(run, batch=1, dtype=torch.float32))[0]
               for build, run in runs)  # fmt: skip


def encoder_network(plan: EncoderPlan) -> tuple[Callable[[], nn.Module], Callable[..., Any]]:
    """Return (build, run), as the engine builds and runs it."""

    def build() -> nn.Module:
        if plan.recipe.own:
            from fastrepa.vision.own import own_network

            return own_network(plan.recipe.name, plan.timm_args["weights"]).to("meta")
        network: Any = timm.create_model(plan.recipe.timm_name, **plan.timm_args)
        cut(network, plan.index, plan.norm)
        return network

    def run(network: Any, batch: int, dtype: torch.dtype) -> Any:
        images = torch.empty(batch, 3, plan.input_side, plan.input_side, dtype=dtype)
        return feature_map(network, images, plan.index, plan.norm)

    return build, run


def encoding(resolution: int) -> Callable[..., Any]:
    """Run the autoencoder's encoder on empty images [B,3,R,R]."""

    def run(network: Any, batch: int, dtype: torch.dtype) -> Any:
        return network.encode(torch.empty(batch, 3, resolution, resolution, dtype=dtype))

    return run


def decoding(resolution: int) -> Callable[..., Any]:
    """Run its decoder on empty latents."""

    def run(network: Any, batch: int, dtype: torch.dtype) -> Any:
        side = resolution // SD_VAE_DOWN
        return network.decode(torch.empty(batch, SD_VAE_CHANNELS, side, side, dtype=dtype))

    return run
