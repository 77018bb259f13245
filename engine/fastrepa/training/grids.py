"""The grids of samples that a run draws while it trains."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.checkpoint.averages import ema_model
from fastrepa.generation.generate import SAMPLE_BATCH, default_labels, generate, rank_batches
from fastrepa.training.trainer import Trainer


def draw_grid(trainer: Trainer, classes: int) -> Tensor | None:
    """Sample `sample.num` images [N,3,R,R] uint8 from the averaged weights, in eval mode; None on
    other ranks than the first (collective). classes: of the data, whose labels take turns.
    """
    config, world = trainer.config, trainer.world
    num = config.sample.num
    labels = default_labels(num, classes)
    mine = rank_batches(num, SAMPLE_BATCH, world.rank, world.size)
    numbers = torch.cat(mine) if mine else torch.empty(0, dtype=torch.int64)
    images: Tensor | None = None
    with ema_model(
        config, trainer.whole, trainer.fixed, trainer.codec, world, needed=bool(mine)
    ) as model:
        if model is not None:
            images = generate(
                model,
                trainer.codec,
                labels[numbers],
                seed=config.seed,
                sample_ids=numbers,
                batch_size=SAMPLE_BATCH,
                sample_config=config.sample,
                path=config.objective.path,
            )
    parts: list[Any] = [None] * world.size
    dist.gather_object((numbers, images), parts if world.is_rank_0 else None, dst=0)
    if not world.is_rank_0:
        return None
    assert images is not None
    grid = torch.empty(num, *images.shape[1:], dtype=torch.uint8)
    for numbers, part in parts:
        if part is not None:
            grid[numbers] = part
    return grid
