"""Noise in place of a data set: what the dry run, `profile` and `bench` take their steps on."""

from __future__ import annotations

from typing import Protocol

import torch

from fastrepa.config import Config
from fastrepa.data.pipeline import Batch, StoredFeatures
from fastrepa.training.targets import Targets
from fastrepa.vision.codec import Codec


class Reader(Protocol):
    """Says which parts a batch has: a Trainer, or another loop."""

    config: Config
    codec: Codec
    targets: Targets
    cached_latents: bool


class RandomBatches:
    """Batches of `size` noise images, with what the trainer would read from a prepared set."""

    def __init__(self, trainer: Reader, device: torch.device, size: int) -> None:
        self.trainer, self.device, self.size = trainer, device, size
        self.generator = torch.Generator().manual_seed(trainer.config.seed)

    def __next__(self) -> Batch:
        config, codec = self.trainer.config, self.trainer.codec
        r = config.data.resolution
        moments = None
        if self.trainer.cached_latents:
            shape = (self.size, 2 * codec.channels, codec.side, codec.side)
            moments = torch.rand(shape, generator=self.generator)
        return Batch(
            image_u8=self._integers(0, 256, (3, r, r), torch.uint8),
            moments=None if moments is None else moments.to(self.device),
            label=self._integers(0, config.model.num_classes, (), torch.int64),
            features=tuple(
                self._stored(encoder.plan.own_grid[0] ** 2, encoder.width)
                for encoder in self.trainer.targets.encoders
                if self.trainer.targets.cached
            ),
        )

    def _stored(self, tokens: int, width: int) -> StoredFeatures:
        scale = torch.ones(self.size, tokens, dtype=torch.float16, device=self.device)
        return StoredFeatures(scale, self._integers(-127, 128, (tokens, width), torch.int8))

    def _integers(
        self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        size = (self.size, *shape)
        values = torch.randint(low, high, size, dtype=dtype, generator=self.generator)
        return values.to(self.device)
