"""A run's knowledge of its images, block by block and step by step.

For every checkpoint: images are encoded, mixed with noise at one time t and given to the averaged
weights under the null class (the true one would tell a probe the answer). A block's output, the
mean over its tokens, is compared with the mean of a frozen encoder's tokens of the clean images
(CKNNA and debiased linear CKA, similarity.py), and read by a linear probe (separability.py).

The evaluation is REPA's (Yu et al. 2025, section 3 and appendix): held-out images, pooled tokens,
k = 10, noised inputs. Shapes: N images, D generator width, Z encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrepa.checkpoint.choice import Wanted, load_ema_model
from fastrepa.checkpoint.format import (
    NotFinite,
    RunState,
    StoredTensors,
    check_finite,
    checkpoints,
    damage,
    read_state,
)
from fastrepa.checkpoint.identity import check_classes, other_samples
from fastrepa.checkpoint.kinds import EMA
from fastrepa.commands.probe.images import choose_classes_of, read_images
from fastrepa.commands.probe.separability import balanced_accuracy, ridge_probe
from fastrepa.commands.probe.similarity import NEIGHBOURS, cknna, linear_cka
from fastrepa.config import CodecConfig, Config, DataConfig, EncoderConfig, ObjectiveConfig
from fastrepa.data.classes import first_difference
from fastrepa.data.column_check import check_column
from fastrepa.data.datasets import is_data, keep_blocks, located
from fastrepa.data.gallery import Gallery, choose
from fastrepa.errors import CheckpointError, ConfigError, DataError
from fastrepa.model.conversion import load_weights
from fastrepa.model.sit import SiT
from fastrepa.randomness import KeyedRandom, Stream
from fastrepa.training.objective import Objective
from fastrepa.vision.codec import Codec, build_codec
from fastrepa.vision.features import own_grid_encoder, plan_encoder
from fastrepa.vision.registry import encoder_label

HELD_OUT = ("validation", "val", "held_out", "test")  # names of a set beside the run's own
TIME = 0.5
IMAGES = 1000
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class RunProbe:
    """The findings of `probe_run`.

    cknna, cka: [E, blocks, steps] of each of E encoders. accuracy: [blocks, steps], balanced, of
    the linear probe; encoder_accuracy: [E]; chance: of guessing; all nan without two classes.
    steps: step 0 is the initial weights. block: the aligned one (1-based); None: none is.
    fitted, held_out: images that the probe was fitted to, and that everything is measured on.
    said: what a reader should know, in words.
    """

    run: Path
    title: str
    encoders: list[str]
    steps: list[int]
    cknna: np.ndarray
    cka: np.ndarray
    accuracy: np.ndarray
    encoder_accuracy: np.ndarray
    chance: float
    block: int | None
    time: float
    seed: int
    fitted: int
    held_out: int
    said: list[str]


def probe_run(
    run: Path,
    *,
    encoders: Sequence[EncoderConfig] = (),
    held_out: Path | None = None,
    num: int = IMAGES,
    time: float = TIME,
    seed: int = 0,
    batch_size: int = 64,
    overrides: Sequence[str] = (),
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> RunProbe:
    """Measure every checkpoint of a run, and its initial weights.

    Args:
        encoders: to compare with; default: those it is aligned to.
        held_out: a data set the run has not seen; default: one named as in HELD_OUT beside its own,
            else other images of its own (which `said` then warns of).
        num: images to measure on, and as many of the run's own set to fit the probe to.
        time: t of the noised inputs, 0 data .. 1 noise.
        seed: of the choice of images, and of the noise.
        overrides: `path.to.key=value` over the run's configuration, such as where its data lie now.

    Raises ConfigError, DataError, CheckpointError and WeightsError for what is missing.
    """
    progress = progress or (lambda *_: None)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not 0 <= time <= 1:
        raise ConfigError(f"--time: {time} is not in 0..1 (0 data, 1 noise)")
    model, config, made = load_ema_model(run, device, Wanted(overrides=tuple(overrides)))
    encoders = encoders or config.vision.encoders
    if not encoders:
        raise ConfigError(f"{run}: is aligned to no encoder; say with --encoders what to compare")
    data = _images(config.data, held_out, num, seed, progress)
    own = data.galleries[0].data
    check_classes(made, own)
    said = [*data.said, *(f"warning: {words}" for words in other_samples(made, own))]
    features = [_encoder_features(e, data, batch_size, device, progress) for e in encoders]
    inputs = _noised(
        config.data.codec, config.objective, data, time, seed, batch_size, device, progress
    )

    saved = dict(_saved(run, said))
    steps = [0, *saved]

    def blocks() -> Iterator[list[np.ndarray]]:
        for column, weights in enumerate(_weights(config, model, made, saved.values())):
            progress(f"step {steps[column]:,}", column / len(steps))
            yield block_features(weights, inputs, time, batch_size)

    found_cknna, found_cka, accuracy = _compared(
        blocks(), features, data, (len(model.blocks), len(steps))
    )
    aligned = bool(config.vision.encoders) and config.alignment.weight > 0
    if config.model.label_dropout == 0:
        said.append("the null class was never trained (model.label_dropout is 0)")
    m = config.model
    names = [encoder_label(e) for e in encoders]
    said += [_leading(*pair, steps) for pair in zip(names, found_cknna, strict=True)]
    return RunProbe(
        run=run,
        title=m.name or f"SiT {m.width} wide, {m.depth} deep",
        encoders=names,
        steps=steps,
        cknna=found_cknna,
        cka=found_cka,
        accuracy=accuracy,
        encoder_accuracy=np.array([data.accuracy(y) for y in features]),
        chance=1 / data.num_classes if data.num_classes else np.nan,
        block=config.alignment.block if aligned else None,
        time=time, seed=seed, said=said,
        fitted=int(np.count_nonzero(~data.rest)),
        held_out=int(np.count_nonzero(data.rest)),
    )  # fmt: skip


def _saved(run: Path, said: list[str]) -> Iterator[tuple[int, StoredTensors]]:
    """Steps and averages of a run's checkpoints; `said` gets what is left out.

    They are opened here: the run may prune them before they are measured.
    """
    for path in checkpoints(run):
        try:
            if problem := damage(path, contents=False):
                problem = f"{path.name} is damaged ({problem}) and"
            else:
                average = StoredTensors(path, EMA)
                check_finite(path, EMA, average)
                yield read_state(path).step, average
        except NotFinite as e:
            problem = f"{e}:"
        except (CheckpointError, OSError):
            if path.is_dir():
                raise
        if problem and path.is_dir():
            said.append(f"warning: {problem} left out")


def _compared(
    blocks: Iterator[list[np.ndarray]],
    features: Sequence[np.ndarray],
    data: _Images,
    shape: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CKNNA and debiased CKA [encoders, depth, steps], and the probe's accuracy [depth, steps].

    `blocks` yields, step by step, the features [N,D] of every block; `features` are the encoders'.
    """
    found_cknna, found_cka = (np.full((len(features), *shape), np.nan) for _ in range(2))
    accuracy = np.full(shape, np.nan)
    for column, of_blocks in enumerate(blocks):
        for block, x in enumerate(of_blocks):
            for number, y in enumerate(features):
                found_cknna[number, block, column] = cknna(x[data.rest], y[data.rest])
                found_cka[number, block, column] = linear_cka(x[data.rest], y[data.rest])
            accuracy[block, column] = data.accuracy(x)
    return found_cknna, found_cka, accuracy


def block_features(model: SiT, x_t: Tensor, time: float, batch_size: int) -> list[np.ndarray]:
    """The mean over tokens of every block's output, float64 [N,D] each, for x_t [N,C,h,w].

    Under the null class, at t = time for all. A block's output is complete where the next one, or
    the final layer, has added its pending branch.
    """
    device = next(model.parameters()).device
    parts: list[list[Tensor]] = [[] for _ in model.blocks]

    def keep(place: int) -> Callable[[Any, Any, Any], None]:
        return lambda module, given, out: parts[place].append(out[0].double().mean(1).cpu())

    after = [*list(model.blocks)[1:], model.final_layer]
    hooks = [module.register_forward_hook(keep(place)) for place, module in enumerate(after)]
    try:
        with torch.no_grad():
            for x in x_t.split(batch_size):
                null = torch.full((len(x),), model.y_embedder.num_classes, device=device)
                model(x.to(device), torch.full((len(x),), time, device=device), null)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(part).numpy() for part in parts]


def _leading(encoder: str, table: np.ndarray, steps: Sequence[int]) -> str:
    """Name the block that agrees most with the encoder at the last step; table [blocks, steps]."""
    if not np.isfinite(table[:, -1]).any():
        return f"no block's features can be compared with {encoder}'s"
    block = int(np.nanargmax(table[:, -1]))
    return (
        f"at step {steps[-1]:,} block {block + 1} of {len(table)} agrees most with {encoder}: "
        f"CKNNA {table[block, -1]:.2f}, {table[block, 0]:.2f} at the start"
    )


def _weights(
    config: Config, model: SiT, made: RunState, averages: Iterable[StoredTensors]
) -> Iterator[SiT]:
    """The initial weights, then each checkpoint's first average, one after the other in `model`.

    The initial ones as the trainer draws them: it seeds torch's generator and builds the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        initial = SiT.from_config(
            config, side=made.side, channels=made.channels, encoder_widths=made.encoder_widths
        )
    model.load_state_dict(initial.state_dict())
    yield model
    for average in averages:
        load_weights(model, average, source=str(average.folder))
        yield model


# The images ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Images:
    """Images that a probe is fitted to, then those that everything is measured on (rest [N] bool).

    galleries, places: where each part comes from. labels: [N], or None without two classes.
    """

    galleries: tuple[Gallery, Gallery]
    places: tuple[np.ndarray, np.ndarray]
    images: Tensor
    labels: np.ndarray
    num_classes: int
    said: list[str]

    @property
    def rest(self) -> np.ndarray:
        return np.arange(len(self.labels)) >= len(self.places[0])

    def accuracy(self, x: np.ndarray) -> float:
        """Balanced, of the linear probe on x [N,D]; nan without two classes."""
        if self.num_classes < 2:
            return np.nan
        fit, labels = ~self.rest, self.labels
        groups = np.arange(int(fit.sum()))
        found = ridge_probe(x[fit], labels[fit], groups, x[self.rest])
        return balanced_accuracy(found == labels[self.rest], labels[self.rest])


def _images(
    config: DataConfig, held_out: Path | None, num: int, seed: int, progress: Progress
) -> _Images:
    keep_blocks(config)
    own = Gallery(located(config.path))
    beside = held_out or _beside(own)
    other = Gallery(beside) if beside else own
    for gallery in (own, other):
        if gallery.resolution != config.resolution:
            raise DataError(
                f"{gallery.path}: images of {gallery.resolution} px, the run's are "
                f"{config.resolution} px"
            )
    if difference := first_difference(own.classes, other.classes):
        number, wanted, found = difference
        raise DataError(
            f"{other.path}: its classes are not those of {own.path}: number {number} is {found!r}, "
            f"not {wanted!r}"
        )
    allowed, said = choose_classes_of(own.labels, num, seed)
    if beside:
        said.insert(0, f"measured on {other.path}")
        fit, rest = (choose(g.labels, num, seed, allowed) for g in (own, other))
    else:
        both = choose(own.labels, 2 * num, seed, allowed)
        both = both[np.argsort(own.labels[both], kind="stable")]  # every class on both sides
        fit, rest = np.sort(both[0::2]), np.sort(both[1::2])
        said.insert(
            0,
            f"warning: no held-out set beside {own.path}; measured on images that the generator "
            f"was trained on; give one with --held-out",
        )
    least = NEIGHBOURS + 2
    if min(len(fit), len(rest)) < least:
        raise DataError(f"{other.path}: {len(rest)} images, at least {least} are needed")
    reads = [
        read_images(g, places, lambda share: progress("reading", share))
        for g, places in ((own, fit), (other, rest))
    ]
    labels = np.concatenate([own.labels[fit], other.labels[rest]])
    return _Images(
        galleries=(own, other),
        places=(fit, rest),
        images=torch.cat(reads),
        labels=labels,
        num_classes=len(allowed) if allowed else 0,
        said=said,
    )


def _beside(own: Gallery) -> Path | None:
    """A held-out set beside the run's own, by its name; of the same classes and side."""
    root = own.path.resolve()
    for name in HELD_OUT:
        path = root.parent / name
        if path != root and is_data(path):
            return own.path.parent / name
    return None


def _encoder_features(
    config: EncoderConfig, data: _Images, batch_size: int, device: torch.device, progress: Progress
) -> np.ndarray:
    """The mean over an encoder's tokens, float64 [N,Z]; from the sets' columns where both have."""
    plan = plan_encoder(config, resolution=data.images.shape[-1])
    columns = [
        next((c for c in gallery.encoders if c.encoder == config.name), None)
        for gallery in data.galleries
    ]
    if all(columns):
        parts = []
        for gallery, column, places in zip(data.galleries, columns, data.places, strict=True):
            assert column is not None
            check_column(gallery.path, column, config, plan, weights=False)
            parts += [gallery.tokens(column, int(p)).mean(0, dtype=np.float64) for p in places]
        return np.stack(parts)
    encoder = own_grid_encoder(config, data.images.shape[-1], torch.float32, device)
    parts = []
    for images in data.images.split(batch_size):
        parts.append(encoder(images.to(device)).double().mean(1).cpu().numpy())
        progress(config.name, len(parts) * batch_size / len(data.images))
    return np.concatenate(parts)


def _noised(
    codec_config: CodecConfig,
    objective: ObjectiveConfig,
    data: _Images,
    time: float,
    seed: int,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Tensor:
    """Return x_t [N,C,h,w] float32 on the CPU; image i has the noise of number i of the seed."""
    resolution = data.images.shape[-1]
    codec: Codec = build_codec(codec_config, resolution=resolution, device=device)
    draw, interpolate = KeyedRandom(seed), Objective(objective).interpolate
    shape, parts = (codec.channels, codec.side, codec.side), []
    with torch.no_grad():
        for numbers in torch.arange(len(data.images)).split(batch_size):
            ids = numbers.to(device)
            latent = draw.normal(Stream.LATENT, 0, ids, shape) if codec.stochastic else None
            z = codec.latents(data.images[numbers].to(device), None, latent)
            noise = draw.normal(Stream.NOISE, 0, ids, shape)
            t = torch.full((len(ids),), time, device=device)
            parts.append(interpolate(z, noise, t)[0].cpu())
            progress("latents", len(parts) * batch_size / len(data.images))
    return torch.cat(parts)
