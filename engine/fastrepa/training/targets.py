"""The alignment's targets, and the latents: computed online, or stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrepa.config import DataConfig, VisionConfig
from fastrepa.data.datasets import DataSet
from fastrepa.data.pipeline import Batch
from fastrepa.errors import ConfigError, nearest
from fastrepa.runtime.terminal import typed
from fastrepa.vision.codec import Codec
from fastrepa.vision.features import (
    CachedFeatures,
    FrozenEncoder,
    build_encoder,
    cached_features,
    spatial_norm,
)


class Targets:
    """The alignment's targets of a batch, one tensor [B,T,Z] for each configured encoder.

    encoders: the frozen networks (`vision.targets: online`) or their stand-ins (`cached`).
    columns: names of the encoders whose stored features a batch must carry.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        resolution: int,
        grid: int,
        dtype: torch.dtype,
        device: torch.device,
        random_weights: bool,
    ) -> None:
        self.config, self.dtype, self.cached = config, dtype, config.cached_targets
        self.encoders: list[FrozenEncoder | CachedFeatures] = []
        size = {"resolution": resolution, "grid": grid}
        for encoder in config.encoders:
            if self.cached:
                self.encoders.append(cached_features(encoder, **size, dtype=dtype))
                continue
            if random_weights:
                encoder = encoder.model_copy(update={"weights": "random"})
            first = torch.float32 if self.config.precision == "fp8" else dtype
            self.encoders.append(build_encoder(encoder, **size, dtype=first, device=device))
        self.widths = [encoder.width for encoder in self.encoders]
        self.columns = tuple(e.name for e in self.encoders) if self.cached else ()
        self.need_images = bool(self.encoders) and not self.cached
        self._likeness: dict[str, float] = {}

    def prepare(self, images: Callable[[], Tensor], *, refuse: bool) -> None:
        """Do what `vision.precision` and `vision.compile` ask for; to be called once.

        images: gives some of what the encoders will see, uint8 [B,3,R,R], to measure fp8 on.
        ConfigError where that cannot run here or, with `refuse`, changes features too much.
        """
        frozen = [e for e in self.encoders if isinstance(e, FrozenEncoder)]
        if self.config.precision == "fp8" and frozen:
            from fastrepa.vision.fp8 import check_likeness, use_fp8

            sample = images()
            for encoder in frozen:
                self._likeness[encoder.name] = likeness = use_fp8(encoder, sample)
                if refuse:
                    check_likeness(encoder.name, likeness)
        if self.config.compile == "graphs":
            for encoder in frozen:
                encoder.use_graphs()

    def check(self, data: DataSet, *, weights: bool) -> None:
        """ConfigError unless the set holds every column that is needed, made as configured.

        With `weights` the encoders' weights are compared too (one rank is enough).
        """
        if not self.cached:
            return
        from fastrepa.data.column_check import check_column, encode_command

        stored = {column.encoder: column for column in data.features}
        for config, encoder in zip(self.config.encoders, self.encoders, strict=True):
            if config.name not in stored:
                there = f"it holds {', '.join(stored)}" if stored else "it holds none"
                raise ConfigError(
                    f"vision.targets: 'cached', but {data.path} has no features of {config.name} "
                    f"({there}){nearest(config.name, stored)}; make them with: "
                    f"{encode_command(data.path, config, encoder.plan)}"
                )
            column = stored[config.name]
            check_column(data.path, column, config, encoder.plan, weights=weights)

    def __call__(self, batch: Batch) -> list[Tensor]:
        if self.cached:
            pairs = zip(self.encoders, batch.features, strict=True)
            found = [encoder(stored.scale, stored.tokens) for encoder, stored in pairs]
        else:
            found = [encoder(batch.image_u8).to(self.dtype) for encoder in self.encoders]
        shares = [encoder.spatial_norm for encoder in self.config.encoders]
        return [
            spatial_norm(tokens, share) if share else tokens
            for tokens, share in zip(found, shares, strict=True)
        ]

    def describe(self) -> str:
        """Name the encoders, for a run's first line."""

        def how(name: str) -> str:
            words = ["cached"] if self.cached else []
            if name in self._likeness:
                words.append(f"fp8, cosine {self._likeness[name]:.5f}")
            if self.config.compile == "graphs" and not self.cached:
                words.append("CUDA graphs")
            return f" ({', '.join(words)})" if words else ""

        names = (
            f"{e.name} {e.grid[0]}x{e.grid[1]}x{e.width} at {e.input_side} px{how(e.name)}"
            for e in self.encoders
        )
        return ", ".join(names) or "none"


def latents_are_cached(config: DataConfig, data: DataSet, codec: Codec) -> bool:
    """Tell whether a run takes its latents from the set's moments.

    ConfigError where `data.latents: cached` asks for what is not there, and where the moments are
    another autoencoder's, which `auto` must not pass over in silence either.
    """
    if config.latents == "online" or not config.codec.is_autoencoder:
        return False
    moments = data.moments
    if moments is None:
        if config.must_cache_latents:
            raise ConfigError(
                f"data.latents: 'cached', but {data.path} holds no latents; make them with: "
                f"fastrepa data encode {typed(data.path)} --codec {config.codec.name}"
            )
        return False
    if (moments.channels, moments.side) != (codec.channels, codec.side):
        raise ConfigError(
            f"data.latents: {data.path} holds moments of {moments.channels}x{moments.side}x"
            f"{moments.side}, the codec gives {codec.channels}x{codec.side}x{codec.side}"
        )
    if moments.digest is not None and moments.digest != getattr(codec, "digest", None):
        raise ConfigError(
            f"data.latents: the moments in {data.path} are of another autoencoder "
            f"({moments.weights!r}) than data.codec.weights {config.codec.weights!r}; set "
            f"data.latents=online or encode them again with --replace"
        )
    return True
