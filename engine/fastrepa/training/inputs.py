"""The frozen parts of a run: the codec gives a batch its latents, the encoders its targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastrepa.config import Config
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
    without = data is None
    codec = build_codec(
        config.data.codec, resolution=config.data.resolution, device=world.device,
        dtype=config.training.dtype, random_weights=without,
    )  # fmt: skip
    targets = Targets(
        config, grid=token_grid(config), dtype=config.training.dtype, device=world.device,
        random_weights=without,
    )  # fmt: skip
    if data is None:
        targets.prepare(_noise_of(config), refuse=False)
        return Inputs(codec, targets, config.data.latents == "cached")
    targets.prepare(partial(first_images, data, config, world.device), refuse=True)
    cached = latents_are_cached(config.data, data, codec)
    targets.check(data, weights=world.is_first)
    return Inputs(codec, targets, cached)


def first_images(data: DataSet, config: Config, device: torch.device) -> Tensor:
    """The first images of the run's order, alike on every rank: uint8 [B,3,R,R]."""
    num = min(LOOKED_AT, sum(data.shard_sizes))
    with DataPipeline(
        data, config.data, global_batch=num, micro_batch=num, seed=config.seed, device=device
    ) as batches:
        images = next(batches).image_u8
        assert images is not None
        return images.clone()  # the pipeline's memory goes with it


def _noise_of(config: Config) -> Callable[[], Tensor]:
    """In place of images, for a run without data: uint8 [B,3,R,R]."""
    size, generator = config.data.resolution, torch.Generator().manual_seed(config.seed)
    shape = (LOOKED_AT, 3, size, size)
    return lambda: torch.randint(256, shape, dtype=torch.uint8, generator=generator)
