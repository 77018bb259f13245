"""The frozen parts of a run: the codec gives a batch its latents, the encoders its targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastrepa.config import Config, DataConfig
from fastrepa.data.datasets import DataSet
from fastrepa.data.pipeline import DataPipeline
from fastrepa.runtime.world import World
from fastrepa.training.targets import Targets, latents_are_cached
from fastrepa.vision.codec import Codec, build_codec, token_grid

LOOKED_AT = 16  # images that an encoder's precision is measured on


@dataclass(frozen=True)
class Inputs:
    """The frozen parts of a run. cached_latents: the data set has the codec's moments."""

    codec: Codec
    targets: Targets
    cached_latents: bool


def build_inputs(config: Config, world: World, data: DataSet | None) -> Inputs:
    """Build codec and encoders for `data`, which is checked to hold what they do not make; without
    data with seeded random weights, and nothing is read.
    """
    without, resolution = data is None, config.data.resolution
    codec = build_codec(
        config.data.codec, resolution=resolution, device=world.device,
        dtype=config.training.dtype, random_weights=without,
    )  # fmt: skip
    targets = Targets(
        config.vision, resolution=resolution, grid=token_grid(config.data, config.model.patch),
        dtype=config.training.dtype, device=world.device, random_weights=without,
    )  # fmt: skip
    if data is None:
        targets.prepare(_noise_of(resolution, config.seed), refuse=False)
        return Inputs(codec, targets, config.data.must_cache_latents)
    images = partial(first_images, data, config.data, config.seed, world.device)
    targets.prepare(images, refuse=True)
    cached = latents_are_cached(config.data, data, codec)
    targets.check(data, weights=world.is_rank_0)
    return Inputs(codec, targets, cached)


def first_images(data: DataSet, config: DataConfig, seed: int, device: torch.device) -> Tensor:
    """The first images of the run's order, alike on every rank: uint8 [B,3,R,R]."""
    num = min(LOOKED_AT, sum(data.shard_sizes))
    with DataPipeline(
        data, config, global_batch=num, micro_batch=num, seed=seed, device=device
    ) as batches:
        images = next(batches).image_u8
        assert images is not None
        return images.clone()  # the pipeline's memory goes with it


def _noise_of(resolution: int, seed: int) -> Callable[[], Tensor]:
    """Stand in for the images of a run without data: noise, uint8 [B,3,R,R]."""
    generator, shape = torch.Generator().manual_seed(seed), (LOOKED_AT, 3, resolution, resolution)
    return lambda: torch.randint(256, shape, dtype=torch.uint8, generator=generator)
