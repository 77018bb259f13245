"""NVIDIA DALI: decoding on the GPU against the CPU, and a training step that it feeds."""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import data_sets
from benchmarks.gpu_suite.plan import B2, ONLINE, TINY, Item, Record, SuiteSize
from benchmarks.provenance import ROOT
from benchmarks.run import quantile
from fastrepa.config import Config, DataConfig, load_config
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.pipeline import Batch, DataPipeline

MOST_OFF = 2
"""Of 255: by how much two JPEG decoders may differ (tests/data/test_pipeline.py)."""


def items(stage: str, size: SuiteSize, out: Path) -> Iterator[Item]:
    yield Item("pixels", partial(_pixels, size), limit=90, estimate=30)
    for decode in size.decode:
        yield Item(f"decoding, {decode}", partial(_rate, size, decode))
    yield Item("a step fed by it", partial(_step, size), limit=90, estimate=30)


@functools.cache
def _set(images: int) -> ShardSet:
    """Synthetic photographs as JPEG of 256 px, with random moments and features beside them."""
    folder = Path(tempfile.mkdtemp(prefix="fastrepa-decoding-"))
    return data_sets.add_columns(data_sets.image_set(folder, images, 4))


def _pipeline(size: SuiteSize, decode: str, batch: int, *, moments: bool = False) -> DataPipeline:
    data = _set(size.images)
    config = DataConfig.model_validate(
        {"path": str(data.path), "resolution": data.resolution, "decode": decode}
    )
    return DataPipeline(
        data, config, global_batch=batch, micro_batch=batch, device=torch.device(size.device),
        image=True, moments=moments,
    )  # fmt: skip


def _pixels(size: SuiteSize) -> Iterator[Record]:
    """The largest and the mean difference of pixels between the first batches of the decoders."""
    images = {}
    for decode in size.decode:
        with _pipeline(size, decode, 16) as pipeline:
            images[decode] = [_image(next(pipeline)).cpu().int() for _ in range(2)]
    first, *others = images
    for other in others:
        off = torch.stack(
            [(a - b).abs() for a, b in zip(images[first], images[other], strict=True)]
        )
        record: Record = {"decoders": [first, other], "most": off.max().item()}
        record |= {"mean": off.float().mean().item(), "images": 32}
        wrong = f"pixels differ by up to {off.max().item()} of 255, allowed {MOST_OFF}"
        yield record | ({} if off.max() <= MOST_OFF else {"problem": wrong})


def _rate(size: SuiteSize, decode: str) -> Iterator[Record]:
    """Images a second, warm: each batch's time from the one before."""
    batch = size.images // 2
    with _pipeline(size, decode, batch) as pipeline:
        for _ in range(4 * size.warmup):
            _image(next(pipeline))
        rates = []
        for _ in range(size.repeats):
            began = time.perf_counter()
            _image(next(pipeline))
            _wait(size)
            rates.append(batch / (time.perf_counter() - began))
    yield {
        "case": "gpu_decode", "decode": decode, "batch": batch, "n": len(rates),
        **{f"p{q}_images_per_s": quantile(rates, q / 100) for q in (20, 50, 80)},
    }  # fmt: skip


def _step(size: SuiteSize) -> Iterator[Record]:
    """A step whose images DALI decodes for the encoder, against the same step fed with noise."""
    from fastrepa.profiling.random_batches import RandomBatches
    from fastrepa.runtime.world import destroy_world, init_world
    from fastrepa.training.trainer import Trainer

    config, world = _config(size), init_world()
    try:
        trainer = Trainer(config, world)
        noise = RandomBatches(trainer, world.device, trainer.micro)
        seconds = {"noise": _steps(trainer, itertools.repeat(next(noise)), size)}
        for decode in size.decode:
            with _pipeline(size, decode, trainer.micro, moments=trainer.cached_latents) as pipeline:
                seconds[decode] = _steps(trainer, pipeline, size)
    finally:
        destroy_world()
    yield {
        "case": "fed_step", "batch": trainer.micro, "steps": size.steps, "seconds_a_step": seconds,
    }  # fmt: skip


def _steps(trainer, batches: Iterator[Batch], size: SuiteSize) -> float:
    for _ in range(size.warmup):
        trainer.train_step(batches)
    _wait(size)
    began = time.perf_counter()
    for _ in range(size.steps):
        trainer.train_step(batches)
    _wait(size)
    return (time.perf_counter() - began) / size.steps


def _config(size: SuiteSize) -> Config:
    if size.device == "cuda":
        return load_config(ROOT / B2, (*ONLINE, "training.global_batch=128"))
    larger = (
        "data.resolution=256", "data.codec.side=128", "model.patch=16",
        "vision.encoders.0.input=128", "training.global_batch=4",
    )  # fmt: skip
    return load_config(ROOT / "configs/quickstart.yaml", (*TINY, *larger))


def _image(batch: Batch) -> torch.Tensor:
    assert batch.image_u8 is not None
    return batch.image_u8


def _wait(size: SuiteSize) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()
