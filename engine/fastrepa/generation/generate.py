"""Images by number: image i of a seed is the same one in any batch, on any process, in any run.

What an image starts from, and the noise that the sde adds on its way, are keyed by (seed, image
number): equal to the bit everywhere (fastrepa.randomness). What the network makes of them depends
on rounding, and a matrix product may round differently in another shape. So every forward has the
same shape, the last one filled up, and processes take whole batches (`rank_batches`):

    same batch size    the same pixels, bit for bit, for any number of images and processes on one
                       kind of device with deterministic kernels
    other batch size   the same images to the rounding of the forward: a few pixels, one level off

Shapes: N images, C channels, h and w latent side, H and W image side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastrepa.config import SampleConfig
from fastrepa.generation.sampler import Velocity, sample
from fastrepa.randomness import KeyedRandom, Stream
from fastrepa.vision.codec import Codec

BATCH_SIZE = 32
SAMPLE_BATCH = 16  # images per forward of a run's grids, the same for any number of ranks


def default_labels(num: int, num_classes: int, classes: Sequence[int] | None = None) -> Tensor:
    """Labels [num] int64: the classes (all of them by default) in turn, by image number."""
    chosen = torch.tensor(list(classes) if classes else range(num_classes), dtype=torch.int64)
    return chosen[torch.arange(num) % len(chosen)]


def rank_batches(num: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """The image numbers [n] int64 of each batch of a rank: batches of 0 .. num - 1, dealt in turn.

    Which images share a batch, and where in it they stand, is the same for every world_size.
    """
    return list(torch.arange(num).split(batch_size))[rank::world_size]


def generate(
    model: Velocity | nn.Module,
    codec: Codec,
    labels: Tensor,
    *,
    seed: int,
    sample_ids: Tensor,
    batch_size: int,
    sample_config: SampleConfig,
    path: str,
    input_shape: tuple[int, int, int] | None = None,
    null_label: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Draw uint8 images [N,3,H,W] on the host, for labels [N] int64 and sample_ids [N] int64.

    `model` maps (x [B,C,h,w] float32, t [B], labels [B]) to a velocity; a module is put in eval
    mode meanwhile. It runs on batches of exactly `batch_size`: a last, shorter one is filled up
    with its last image. `input_shape` (C, h, w) defaults to the codec's and `null_label` to the
    model's number of classes. `progress` is told the images made since its last call, in
    fractions of an image as the sampler goes. `sample_config.num` is not used, and of its precision
    only whether it is tf32: `loading.ready_to_sample` is for the rest.

    Raises ValueError where labels and sample_ids differ in length.
    """
    if labels.shape != sample_ids.shape or labels.dim() != 1:
        raise ValueError(f"labels {list(labels.shape)} and sample_ids {list(sample_ids.shape)}")
    device = next(model.parameters()).device if isinstance(model, nn.Module) else labels.device
    shape = input_shape or (codec.channels, codec.side, codec.side)
    if null_label is None:
        null_label = int(cast(Any, model).y_embedder.num_classes)
    if len(labels) == 0:
        with torch.no_grad():  # no image, but an image's shape
            return codec.decode(torch.zeros(1, *shape, device=device))[:0].cpu()
    random = KeyedRandom(seed)
    images: list[Tensor] = []
    with _evaluating(model), _products(sample_config.precision), torch.no_grad():
        for ids, wanted in zip(sample_ids.split(batch_size), labels.split(batch_size), strict=True):
            count = len(ids)
            ids = _fill(ids, batch_size).to(device, torch.int64)
            wanted = _fill(wanted, batch_size).to(device)

            def step_noise(step: int, ids: Tensor = ids) -> Tensor:
                return random.normal(Stream.SAMPLE_STEP, step, ids, shape, dtype=torch.float64)

            def advance(_: int, count: int = count) -> None:
                if progress is not None:
                    progress(count / sample_config.steps)

            latents = sample(
                model,
                random.normal(Stream.SAMPLE_NOISE, 0, ids, shape),
                wanted,
                sampler=sample_config.sampler,
                steps=sample_config.steps,
                cfg=sample_config.cfg,
                guidance_low=sample_config.guidance_low,
                guidance_high=sample_config.guidance_high,
                path=path,
                null_label=null_label,
                step_noise=step_noise,
                progress=advance,
            )
            images.append(codec.decode(latents)[:count].cpu())
    return torch.cat(images)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Take float32 products in TF32 where `precision` is that, and as they were afterwards."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _fill(values: Tensor, length: int) -> Tensor:
    """Lengthen values [n] to [length] by repeating the last."""
    return torch.cat((values, values[-1:].expand(length - len(values))))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A module in eval mode (no label dropout), and as it was afterwards."""
    if not (isinstance(model, nn.Module) and model.training):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
