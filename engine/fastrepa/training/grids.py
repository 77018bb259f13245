"""The grids of samples that a run draws while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.checkpoint.averages import ema_model
from fastrepa.errors import decoration
from fastrepa.generation.generate import SAMPLE_BATCH, default_labels, generate, rank_batches
from fastrepa.training.trainer import Trainer


def draw_grid(
    trainer: Trainer,
    classes: Sequence[int],
    warn: Callable[[str], None],
    progress: Callable[[float], None] | None = None,
) -> Tensor | None:
    """Sample `sample.num` images [N,3,R,R] uint8 from the averaged weights, in eval mode; None on
    other ranks than the first (collective). classes: their numbers, which take turns.

    A rank that cannot draw its images leaves the grid out, which `warn` is told. `progress` is told
    the images that all ranks made since its last call, by this one's own.
    """
    config, world = trainer.config, trainer.world
    num = config.sample.num
    labels = default_labels(num, config.model.num_classes, classes)
    mine = rank_batches(num, SAMPLE_BATCH, world.rank, world.size)
    numbers = torch.cat(mine) if mine else torch.empty(0, dtype=torch.int64)
    images: Tensor | None = None
    problems: list[str] = []
    with ema_model(
        config, trainer.whole, trainer.fixed, trainer.codec, world, needed=bool(mine)
    ) as model:
        if model is not None:
            with decoration(f"samples of step {trainer.step}", problems.append):
                images = generate(
                    model,
                    trainer.codec,
                    labels[numbers],
                    seed=config.seed,
                    sample_ids=numbers,
                    batch_size=SAMPLE_BATCH,
                    sample_config=config.sample,
                    path=config.objective.path,
                    progress=progress and (lambda made: progress(made * world.size)),
                )
    parts: list[Any] = [None] * world.size
    dist.gather_object((numbers, images, problems), parts if world.is_rank_0 else None, dst=0)
    if not world.is_rank_0:
        return None
    if problem := next((problem for *_, of_rank in parts for problem in of_rank), None):
        warn(problem)
        return None
    assert images is not None
    grid = torch.empty(num, *images.shape[1:], dtype=torch.uint8)
    for numbers, part, _ in parts:
        if part is not None:
            grid[numbers] = part
    return grid
