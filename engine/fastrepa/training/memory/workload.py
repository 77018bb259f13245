"""The cost of one image of a configuration: parameters, FLOPs, memory, bytes read. Nothing is built
that has values, and no weights are read or downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastrepa.config import (
    Config,
    DataConfig,
    SampleConfig,
    TrainingConfig,
    VisionConfig,
    ZeroConfig,
)
from fastrepa.data.datasets import located
from fastrepa.data.format.columns import features_dtype, moments_dtype
from fastrepa.data.format.shards import MANIFEST, Manifest, load_manifest
from fastrepa.model.flops import model_flops
from fastrepa.model.sit import SiT, recomputed_blocks
from fastrepa.training.memory.activations import Frozen, MemoryCurve, frozen_network, training_curve
from fastrepa.training.memory.frozen import decoding, encoder_network, encoding
from fastrepa.training.memory.sharding import Parameters
from fastrepa.vision.codec import (
    SD_VAE_PARAMETERS,
    codec_shape,
    random_sd_vae,
    token_grid,
)
from fastrepa.vision.features import EncoderPlan, plan_encoder

PIXEL_BYTES = 0.6
"""Assumed bytes of an encoded image per pixel, where no data set is there to look at."""


@dataclass(frozen=True)
class Workload:
    """One configuration, whatever it runs on. FLOPs and bytes are per image.

    forward_flops: of the generator and its projectors; block_flops: of its blocks alone;
    training_flops: forward and backward, nothing twice. encoders and codec: those that run in
    training, with their names; codec_weights: of both halves; codec_decoder: what the grids of
    sample_every run, if any.
    """

    config: Config
    side: int
    channels: int
    encoder_widths: tuple[int, ...]
    parameters: Parameters
    forward_flops: int
    block_flops: int
    training_flops: int
    encoders: tuple[tuple[str, Frozen], ...]
    codec_weights: int
    codec_encoder: Frozen | None
    codec_decoder: Frozen | None
    input_bytes: float
    input_is: str

    def curve(self, recompute: int, keep_h: bool) -> MemoryCurve:
        """Return it where every `recompute`-th block runs again (0: none), with h kept or not."""
        t = TrainingConfig(
            precision=self.config.training.precision,
            recompute=recompute or "none",
            keep="h" if keep_h else "none",
        )
        return _curve(self.config, t, self.side, self.channels, self.encoder_widths)

    def recomputed_flops(self, recompute: int) -> float:
        """Count one image's. The second forward ends once it has what backward wants: with kernels
        "eager" before a block's last product, which is a part of the fused operation.
        """
        m = self.config.model
        last = 2 * (self.side // m.patch) ** 2 * 4 * m.width**2
        last = 0 if self.config.fused else last
        return recomputed_blocks(m.depth, recompute) * (self.block_flops / m.depth - last)


def measure_workload(config: Config, *, image_bytes: float | None = None) -> Workload:
    """Take a configuration's measures. ConfigError where its shapes do not work.

    image_bytes: of one stored image; by default the data set's mean where it is there already,
    otherwise an assumption (PIXEL_BYTES).
    """
    resolution = config.data.resolution
    channels, side = codec_shape(config.data.codec, resolution)
    token_grid(config.data, config.model.patch)  # refuses a patch that does not suit
    plans = [plan_encoder(e, resolution=resolution) for e in config.vision.encoders]
    widths = tuple(p.width for p in plans)
    dtype = config.training.dtype
    with torch.device("meta"):
        model = SiT.from_config(config, side=side, channels=channels, encoder_widths=widths)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    parameters = Parameters(
        tuple(n for n, trained in sizes if trained), tuple(n for n, trained in sizes if not trained)
    )

    flops = model_flops(
        config.model, config.alignment, side=side, channels=channels, encoder_widths=widths
    )

    manifest = _manifest(config.data.path)
    cached_latents = _latents_are_cached(config.data, manifest)
    online = not config.vision.cached_targets
    encoders = tuple(
        (e.name, frozen_network(*encoder_network(plan), dtype))
        for e, plan in zip(config.vision.encoders, plans, strict=True)
        if online
    )
    codec_weights, encoder, decoder = 0, None, None
    if config.data.codec.is_autoencoder:  # built, by diffusers, only where it is run
        codec_weights = SD_VAE_PARAMETERS * dtype.itemsize
        if not cached_latents:
            encoder = frozen_network(random_sd_vae, encoding(resolution), dtype)
        if config.training.sample_every:
            decoder = frozen_network(random_sd_vae, decoding(resolution), dtype)
    size, described = _input(
        config.data, config.vision, plans, manifest, image_bytes, side=side, channels=channels,
        image=not cached_latents or bool(encoders), latents=cached_latents,
    )  # fmt: skip
    return Workload(
        config, side, channels, widths, parameters, flops.forward, flops.blocks, flops.training,
        encoders, codec_weights, encoder, decoder, size, described,
    )  # fmt: skip


@lru_cache(maxsize=32)
def _curve_of(key: str, side: int, channels: int, widths: tuple[int, ...]) -> MemoryCurve:
    return training_curve(
        Config.model_validate_json(key, strict=False),
        side=side,
        channels=channels,
        encoder_widths=widths,
    )


def _curve(
    config: Config, training: TrainingConfig, side: int, channels: int, widths: tuple[int, ...]
) -> MemoryCurve:
    # What the generator's memory does not depend on must not make it be traced again.
    same = {"run": "-", "seed": 0, "data": DataConfig(path="-"), "training": training,
            "vision": VisionConfig(), "sample": SampleConfig(), "zero": ZeroConfig()}  # fmt: skip
    key = config.model_copy(update=same).model_dump_json()
    return _curve_of(key, side, channels, widths)


def _manifest(path: str) -> Manifest | None:
    folder = located(path)
    return load_manifest(folder) if (folder / MANIFEST).is_file() else None


def _latents_are_cached(config: DataConfig, manifest: Manifest | None) -> bool:
    if config.latents == "online" or not config.codec.is_autoencoder:
        return False
    if config.must_cache_latents:
        return True
    return manifest is not None and manifest.moments is not None


def _input(
    data: DataConfig,
    vision: VisionConfig,
    plans: list[EncoderPlan],
    manifest: Manifest | None,
    image_bytes: float | None,
    *,
    side: int,
    channels: int,
    image: bool,
    latents: bool,
) -> tuple[float, str]:
    """Return (bytes per image, what they are)."""
    size, parts = 0.0, []
    if image:
        if image_bytes is not None:
            each, why = image_bytes, "as given"
        elif manifest is not None:
            each = sum(s.bytes for s in manifest.shards) / manifest.num_samples
            why = f"mean of {data.path}"
        else:
            each = PIXEL_BYTES * data.resolution**2
            why = f"assumed, {PIXEL_BYTES} a pixel"
        size += each
        parts.append(f"image {each:,.0f} ({why})")
    if latents:
        row = moments_dtype(channels, side).itemsize
        size += row
        parts.append(f"moments {row:,}")
    if vision.cached_targets:
        rows = sum(features_dtype(p.own_grid[0] * p.own_grid[1], p.width).itemsize for p in plans)
        size += rows
        parts.append(f"features {rows:,}")
    return size, " + ".join(parts)
