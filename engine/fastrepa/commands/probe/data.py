"""The probe of a data set: whether an encoder will help on it, before any GPU-week is spent.

Every encoder is measured beside two controls on the same sample: a network of its shape with random
weights, and raw pixels cut into its token grid. What is measured is in similarity.py (spatial
structure, effective rank, collapse), separability.py (classes) and duplicates.py.

Classes are told from two readouts of the tokens, the same for controls: their mean over the image
(as REPA reads them), by the mean of linear probe and neighbours; and the map of them, averaged
to at most 4 x 4 and laid end to end, by the linear probe (pixels keep their layout there).

The verdict (`verdict`), where "better" is by more than two standard errors of the choice of images:
- helps: better than raw pixels and than random weights, in both readouts;
- no better than raw pixels: better than them in neither readout;
- unclear: anything else, and whatever has no labels to be judged by.
The ranking goes by verdict, then by spatial structure (LDS), which predicts the gain of alignment
better than any accuracy does (iREPA: Singh et al. 2025); accuracy only says whether what is there
is of these images at all. Shapes: N images, T tokens, Z feature width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrepa.commands.probe.duplicates import (
    alike_by_features,
    alike_by_hash,
    difference_hash,
    groups_of,
)
from fastrepa.commands.probe.images import ImageSample, draw_sample
from fastrepa.commands.probe.separability import (
    balanced_accuracy,
    cross_validated,
    gain,
    knn_probe,
    ridge_probe,
)
from fastrepa.commands.probe.similarity import (
    contrast,
    effective_rank,
    local_distant_similarity,
    mean_cosine,
    mean_share,
)
from fastrepa.config import EncoderConfig
from fastrepa.data.format.columns import features_dtype
from fastrepa.data.gallery import choose
from fastrepa.data.sheet import false_colours, principal_components
from fastrepa.errors import ConfigError, DataError, WeightsError
from fastrepa.vision.features import own_grid_encoder
from fastrepa.vision.registry import encoder_label, find_recipe

IMAGES = 500
PICTURED = 6
LAYOUT = 4  # side that token maps are averaged down to where their layout is read
PATCH = 8  # pixels of a side of raw pixels' tokens, at most
ERRORS = 2.0  # standard errors that "better" takes
REPEATS = 2  # of cross-validation, with other folds
PIXELS, RANDOM = "raw pixels", "random weights"
VERDICTS = ("helps", "unclear", "no better than raw pixels")
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Separability:
    """Balanced accuracies, and what each image's was: [N], 0..1, for comparisons."""

    linear: float
    neighbours: float
    layout: float
    pooled_right: np.ndarray
    layout_right: np.ndarray


@dataclass(frozen=True)
class Measured:
    """One representation of the sample. lds and rmsc are means over images, with lds's standard
    error; rank: effective, of the centred tokens; mean_share and mean_cosine: of tokens and of
    pooled features, 1 is collapse. colours: uint8 [P,h,w,3], principal components of P images.
    """

    name: str
    grid: int
    width: int
    lds: float
    lds_error: float
    rmsc: float
    rank: float
    mean_share: float
    mean_cosine: float
    separability: Separability | None
    colours: np.ndarray


@dataclass(frozen=True)
class EncoderProbe:
    """One encoder, its controls and the verdict on it.

    gains: (balanced accuracy above a control, its standard error) by "READOUT over CONTROL".
    duplicates: pairs of images nearly identical by its features. cache_bytes: of an image's int8
    tokens. images_per_second: of its forward, preprocessing included, on the device.
    """

    config: EncoderConfig
    input_side: int
    features: Measured
    random: Measured
    pixels: Measured
    gains: dict[str, tuple[float, float]]
    duplicates: int
    images_per_second: float
    cache_bytes: int
    verdict: str
    why: str


@dataclass(frozen=True)
class DataProbe:
    """The findings of `probe_data`: encoders best first, and those that could not be had, with why.

    duplicates: names of pairs of images nearly identical by hash. groups: of images that are kept
    on one side of every split.
    """

    data: Path
    sample: ImageSample
    pictured: np.ndarray
    encoders: list[EncoderProbe]
    missing: list[tuple[str, str]]
    duplicates: list[tuple[str, str]]
    groups: int
    seed: int
    device: str
    said: list[str] = field(default_factory=list)


def probe_data(
    data: Path,
    encoders: Sequence[EncoderConfig],
    *,
    num: int = IMAGES,
    seed: int = 0,
    resolution: int | None = None,
    batch_size: int = 32,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> DataProbe:
    """Measure encoders on `num` images of a data set, or of a plain folder of images.

    Encoders whose weights are missing are named in the result, and the others go on.
    Raises ConfigError for an unknown encoder, DataError for the images, WeightsError where no
    encoder could be had.
    """
    progress = progress or (lambda *_: None)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = [encoder_label(config) for config in encoders]
    for config, label in zip(encoders, labels, strict=True):
        find_recipe(config.name)  # a mistyped name fails before anything is read
        if labels.count(label) > 1:
            raise ConfigError(f"--encoders: {label} is named twice")
    sample = draw_sample(
        data, num, seed=seed, resolution=resolution, progress=lambda s: progress("reading", s)
    )
    if len(sample.names) < 2:
        raise DataError(f"{data}: {len(sample.names)} image, at least 2 are needed")
    of_class = sample.labels if sample.labels is not None else np.zeros(len(sample.names), int)
    pictured = choose(of_class, PICTURED, seed)

    tokens, missing = _encoded(encoders, sample.images, batch_size, device, progress)
    hashes = np.stack([difference_hash(i.permute(1, 2, 0).numpy()) for i in sample.images])
    by_hash = alike_by_hash(hashes)
    by_features = [alike_by_features(made.features.numpy()) for made in tokens]
    groups = groups_of(len(sample.names), by_hash, *by_features)

    def measure(name: str, tokens: Tensor) -> Measured:
        return _measure(name, tokens, sample.labels, groups, pictured)

    pixels: dict[int, Measured] = {}
    found: list[EncoderProbe] = []
    for made, alike in zip(tokens, by_features, strict=True):
        label, grid = encoder_label(made.config), _grid(made.features)
        progress(f"measuring {label}", 0.5 + 0.5 * len(found) / len(tokens))
        if grid not in pixels:
            pixels[grid] = measure(PIXELS, pixel_tokens(sample.images, grid))
        features, random = measure(label, made.features), measure(RANDOM, made.random)
        gains = _gains(features, {RANDOM: random, PIXELS: pixels[grid]}, sample.labels, groups)
        word, why = verdict(features, gains, sample.no_labels)
        found.append(
            EncoderProbe(
                config=made.config,
                input_side=made.input_side,
                features=features,
                random=random,
                pixels=pixels[grid],
                gains=gains,
                duplicates=len(alike),
                images_per_second=made.images_per_second,
                cache_bytes=features_dtype(*made.features.shape[1:]).itemsize,
                verdict=word,
                why=why,
            )
        )
    found.sort(key=lambda e: (VERDICTS.index(e.verdict), -e.features.lds))
    return DataProbe(
        data=data,
        sample=sample,
        pictured=pictured,
        encoders=found,
        missing=missing,
        duplicates=[(sample.names[a], sample.names[b]) for a, b in by_hash],
        groups=len(np.unique(groups)),
        seed=seed,
        device=_named(device),
        said=list(sample.said),
    )


def verdict(
    features: Measured, gains: dict[str, tuple[float, float]], no_labels: str
) -> tuple[str, str]:
    """Return (one of VERDICTS, why in words), by the rule at the head of this module."""
    if features.lds <= ERRORS * features.lds_error:
        return "unclear", "its tokens do not vary over the image: there is nothing to align to"
    if no_labels:
        return "unclear", "without labels nothing says whether the features fit these images"
    better = {name: by > ERRORS * error for name, (by, error) in gains.items()}
    over_pixels = [better[f"{readout} over {PIXELS}"] for readout in ("pooled", "layout")]
    over_random = [better[f"{readout} over {RANDOM}"] for readout in ("pooled", "layout")]
    if not any(over_pixels):
        return "no better than raw pixels", "raw pixels tell the classes apart as well"
    if all(over_pixels) and all(over_random):
        return "helps", "tells the classes apart better than raw pixels and random weights do"
    rival = PIXELS if not all(over_pixels) else RANDOM
    return "unclear", f"not surely better than {rival} in every readout"


def pixel_tokens(images: Tensor, grid: int) -> Tensor:
    """Raw pixels as an encoder would give them: uint8 [N,3,R,R] -> float [N,T,3*p*p] in [-1, 1].

    A token is a patch of p x p pixels; averaged down to p = PATCH where it has more, and where the
    grid does not divide the image's side.
    """
    patch = min(PATCH, max(1, images.shape[-1] // grid))
    x = F.adaptive_avg_pool2d(images.float() / 127.5 - 1, patch * grid)
    return F.unfold(x, patch, stride=patch).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class _Encoded:
    """An encoder's tokens of the sample and those of its random-weight twin: float32 [N,T,Z]."""

    config: EncoderConfig
    features: Tensor
    random: Tensor
    images_per_second: float
    input_side: int


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _encoded(
    encoders: Sequence[EncoderConfig],
    images: Tensor,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> tuple[list[_Encoded], list[tuple[str, str]]]:
    """The encoders that could be had, and (label, reason) of those that are missing."""
    tokens, missing = [], []
    for number, config in enumerate(encoders):
        label = encoder_label(config)
        progress(label, number / len(encoders) / 2)
        try:
            tokens.append(_encode(config, images, batch_size, device))
        except WeightsError as error:
            missing.append((label, str(error)))
    if not tokens:
        raise WeightsError("; ".join(reason for _, reason in missing))
    return tokens, missing


def _encode(
    config: EncoderConfig, images: Tensor, batch_size: int, device: torch.device
) -> _Encoded:
    made, seconds = [], []
    for weights in (config.weights, "random"):
        one = config.model_copy(update={"weights": weights})
        encoder = own_grid_encoder(one, images.shape[-1], torch.float32, device)
        encoder(images[:2].to(device))  # the first call chooses algorithms
        started = time.perf_counter()
        parts = [encoder(batch.to(device)).cpu() for batch in images.split(batch_size)]
        seconds.append(time.perf_counter() - started)
        made.append(torch.cat(parts))
    features, random = made
    return _Encoded(config, features, random, len(images) / seconds[0], encoder.input_side)


def _grid(tokens: Tensor) -> int:
    return round(tokens.shape[1] ** 0.5)


def _measure(
    name: str, tokens: Tensor, labels: np.ndarray | None, groups: np.ndarray, pictured: np.ndarray
) -> Measured:
    n, _, width = tokens.shape
    grid, each = _grid(tokens), tokens.numpy()
    flat = each.reshape(-1, width)
    lds = local_distant_similarity(each) if grid > 1 else np.zeros(n)
    pooled = tokens.double().mean(1).numpy()
    parts = principal_components(each[pictured].reshape(-1, width))
    return Measured(
        name=name,
        grid=grid,
        width=width,
        lds=float(lds.mean()),
        lds_error=float(lds.std(ddof=1) / np.sqrt(n)),
        rmsc=float(contrast(each).mean()),
        rank=effective_rank(flat - flat.mean(0, dtype=np.float64)),
        mean_share=mean_share(flat),
        mean_cosine=mean_cosine(pooled),
        separability=None if labels is None else _separability(tokens, pooled, labels, groups),
        colours=false_colours(parts.reshape(len(pictured), grid, grid, -1)),
    )


def _separability(
    tokens: Tensor, pooled: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> Separability:
    grid = _grid(tokens)
    maps = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    if grid > LAYOUT:
        maps = F.adaptive_avg_pool2d(maps, LAYOUT)
    layout = maps.flatten(1).double().numpy()
    linear, neighbours = (
        cross_validated(probe, pooled, labels, groups, repeats=REPEATS)
        for probe in (ridge_probe, knn_probe)
    )
    laid_out = cross_validated(ridge_probe, layout, labels, groups)
    return Separability(
        linear=balanced_accuracy(linear, labels),
        neighbours=balanced_accuracy(neighbours, labels),
        layout=balanced_accuracy(laid_out, labels),
        pooled_right=(linear + neighbours) / 2,
        layout_right=laid_out,
    )


def _gains(
    features: Measured, controls: dict[str, Measured], labels: np.ndarray | None, groups: np.ndarray
) -> dict[str, tuple[float, float]]:
    own = features.separability
    if own is None or labels is None:
        return {}
    found = {}
    for name, control in controls.items():
        other = control.separability
        assert other is not None
        found[f"pooled over {name}"] = gain(own.pooled_right, other.pooled_right, labels, groups)
        found[f"layout over {name}"] = gain(own.layout_right, other.layout_right, labels, groups)
    return found
