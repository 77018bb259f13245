"""Makers of a column's rows: a network, or the files of REPA's own layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fastrepa.commands.prepare.column_files import Column
from fastrepa.config import CodecConfig, EncoderConfig
from fastrepa.data.column_check import column_fields
from fastrepa.data.format.columns import moments_dtype
from fastrepa.data.format.index import load_index
from fastrepa.data.format.reference import read_moments
from fastrepa.data.format.reference_layout import moments_of
from fastrepa.data.format.shards import FeaturesColumn, MomentsColumn, ShardSet
from fastrepa.errors import ConfigError, DataError
from fastrepa.reading.text import parse_json
from fastrepa.vision.codec import build_codec
from fastrepa.vision.features import own_grid_encoder
from fastrepa.vision.quantise import cosines, dequantise, quantise

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Maker(Protocol):
    """Makes the rows of one column. `column` has no files yet."""

    column: Column
    reads_images: bool

    def rows(self, images: Tensor | None, shard: int, samples: range) -> Any:
        """Return (structured rows [n, views] without their CRC, the lowest cosine) of n samples:
        the first of images uint8 [B,3,R,R], a full batch.
        """


class MakesMoments:
    reads_images = True

    def __init__(
        self,
        config: CodecConfig,
        resolution: int,
        views: int,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.codec: Any = build_codec(
            config, resolution=resolution, device=device, dtype=DTYPES[precision]
        )
        if not hasattr(self.codec, "digest"):
            raise ConfigError(f"codec {config.name}: has no latents to store; sd-vae has")
        self.column = MomentsColumn(
            views=views,
            precision=precision,
            weights=config.weights,
            digest=self.codec.digest,
            files=(),
            channels=self.codec.channels,
            side=self.codec.side,
        )

    def rows(self, images: Tensor, shard: int, samples: range) -> tuple[np.ndarray, float]:
        moments = _by_view(self.codec.encode, images, self.column.views, len(samples))
        return moment_rows(moments.cpu().numpy(), self.column), 1.0


class MakesFeatures:
    reads_images = True

    def __init__(
        self,
        config: EncoderConfig,
        resolution: int,
        views: int,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.encoder = own_grid_encoder(config, resolution, DTYPES[precision], device)
        self.column = FeaturesColumn(
            views=views,
            precision=precision,
            weights=config.weights,
            digest=self.encoder.digest,
            files=(),
            min_cosine=1.0,
            **column_fields(config, self.encoder.plan),
        )

    def rows(self, images: Tensor, shard: int, samples: range) -> tuple[np.ndarray, float]:
        x = _by_view(self.encoder, images, self.column.views, len(samples)).flatten(0, 1)
        try:
            scale, tokens = quantise(x)
        except ValueError as error:
            raise DataError(f"{self.column.name}: the encoder gave {error}") from None
        rows = np.zeros((len(samples), self.column.views), self.column.dtype)
        rows["scale"] = scale.cpu().numpy().reshape(rows["scale"].shape)
        rows["tokens"] = tokens.cpu().numpy().reshape(rows["tokens"].shape)
        return rows, float(cosines(x, dequantise(scale, tokens)).min())


class CopiesMoments:
    """The moments that a set's source, in REPA's reference layout, holds beside its images."""

    reads_images = False

    def __init__(self, data: ShardSet, root: Path) -> None:
        self._paths, self._root = data.index_paths, root
        with (data.path / data.manifest.sources.file).open(encoding="utf-8") as file:
            self._sources = [parse_json(line, file.name) for line in file]
        first = next(name for name in self._sources if name)
        channels2, side, _ = read_moments(root / moments_of(first)).shape
        if data.resolution != 8 * side:
            raise ConfigError(
                f"{root}: its latents are those of {8 * side} px images, not of "
                f"{data.resolution} px; prepare with --resolution {8 * side}"
            )
        self.column = MomentsColumn(
            views=1,
            precision="fp32",
            weights="reference layout",
            digest=None,
            files=(),
            channels=channels2 // 2,
            side=side,
        )

    def rows(self, images: None, shard: int, samples: range) -> tuple[np.ndarray, float]:
        keys = load_index(self._paths[shard])["key"][samples.start : samples.stop]
        arrays = [read_moments(self._root / moments_of(self._sources[int(k)])) for k in keys]
        return moment_rows(np.stack(arrays)[:, None], self.column), 1.0


def moment_rows(moments: np.ndarray, column: MomentsColumn) -> np.ndarray:
    """Rows of a moments column from cat[mean, std] [n, views, 2C, h, w]; no CRC yet.

    DataError for values that are not finite in fp16, or a negative standard deviation.
    """
    rows = np.zeros(moments.shape[:2], moments_dtype(column.channels, column.side))
    with np.errstate(over="ignore"):
        rows["moments"] = moments
    if not np.isfinite(rows["moments"]).all():
        raise DataError("moments: not finite in fp16")
    if (rows["moments"][:, :, column.channels :] < 0).any():
        raise DataError("moments: a negative standard deviation")
    return rows


def _by_view(network: Any, images: Tensor, views: int, count: int) -> Tensor:
    """The network's output for the first `count` of full batches of images: [count, views, ...]."""
    seen = [images, images.flip(-1)][:views]
    return torch.stack([network(view)[:count] for view in seen], dim=1)


def column_makers(
    data: ShardSet,
    codec: CodecConfig | None,
    encoders: Sequence[EncoderConfig],
    reference: Path | None,
    flip: bool,
    precision: Precision,
    device: torch.device,
) -> list[Maker]:
    views = 2 if flip else 1
    makers: list[Any] = []
    if reference is not None and codec is None:
        if flip:
            raise ConfigError(
                "--flip: the reference layout holds no latents of mirrored images; encode them "
                "with --codec sd-vae"
            )
        makers.append(CopiesMoments(data, reference))
    if codec is not None:
        makers.append(MakesMoments(codec, data.resolution, views, precision, device))
    names = [encoder.name for encoder in encoders]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--cache-features: {name} is named twice")
    makers += [MakesFeatures(e, data.resolution, views, precision, device) for e in encoders]
    return makers
