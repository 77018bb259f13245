"""The field's numbers for generated images: which there are, and two sets compared.

    fid, sfid, kid, precision, recall, inception_score      torch-fidelity's Inception
    fd_SPACE, kd_SPACE, precision_SPACE, recall_SPACE       any encoder (vision/pooled.py)
    clip_score                                              open_clip, "a photo of a CLASS"

A distance in another space than Inception's is never called FID or KID: fd_dinov2_vitb14.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastrepa.commands.evaluate.extractors import PROMPT, Clip, Encoder, Extractor, Inception
from fastrepa.commands.evaluate.feature_sets import FeatureSet, StatisticsCache, Wanted, extract
from fastrepa.commands.evaluate.image_sources import AdmImages, Gaussian, ImageSource, Statistics
from fastrepa.commands.evaluate.metrics import (
    NEIGHBOURS,
    clip_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from fastrepa.commands.evaluate.own_metric import OwnMetric
from fastrepa.config import EncoderConfig
from fastrepa.config.values import is_own
from fastrepa.errors import ConfigError, DataError, nearest, print_warning, worded
from fastrepa.reading.own_code import own_code
from fastrepa.runtime.ownership import InUse, take
from fastrepa.runtime.world import World, of_rank_0, on_all
from fastrepa.vision.pooled import space_name
from fastrepa.vision.registry import REGISTRY

Kind = Literal["frechet", "kernel", "precision", "recall", "inception_score", "clip_score", "own"]

INCEPTION: dict[str, tuple[Kind, str]] = {
    "fid": ("frechet", "pool"),
    "sfid": ("frechet", "spatial"),
    "inception_score": ("inception_score", "logits"),
    "kid": ("kernel", "pool"),
    "precision": ("precision", "pool"),
    "recall": ("recall", "pool"),
}
PREFIXES: dict[str, Kind] = {
    "fd": "frechet",
    "kd": "kernel",
    "precision": "precision",
    "recall": "recall",
}
CLIP = "clip_score"
HIGHER: tuple[Kind, ...] = (
    "precision",
    "recall",
    "inception_score",
    "clip_score",
)  # kinds where more is better
OF_SAMPLES: tuple[Kind, ...] = ("inception_score", "clip_score")  # kinds that look at no reference
LEAST: dict[Kind, int] = {
    "frechet": 2,
    "kernel": 2,
    "precision": NEIGHBOURS + 1,
    "recall": NEIGHBOURS + 1,
}  # images that a kind needs of either side; one, if it is not here
ENOUGH = 10  # images for every dimension of a Frechet distance, below which its bias is warned of
BATCH_SIZE = 32
PATIENCE = 5.0  # seconds of the first rank, while the others wait for it


@dataclass(frozen=True)
class Metric:
    """A metric by name; `feature` is what it compares, as "space.feature". own: of kind "own", the
    class of the user's (OwnMetric), and where it is, FILE.py:CLASS.
    """

    name: str
    kind: Kind
    feature: str
    own: tuple[Any, str] | None = None

    @property
    def higher_is_better(self) -> bool:
        if self.own is not None:
            return bool(getattr(self.own[0], "higher_is_better", False))
        return self.kind in HIGHER


def choose_metrics(
    names: Sequence[str] | None, encoders: Sequence[EncoderConfig] = ()
) -> tuple[list[Metric], list[EncoderConfig]]:
    """Metrics by name, and the encoders they need.

    By default all of the encoders', or Inception's where there is no encoder. A space of the
    registry (fd_dinov2_vitb14) need not be among `encoders`: its weights are then the hub's.
    Raises ConfigError naming a metric that is not known, and two encoders of one space.
    """
    found: dict[str, EncoderConfig] = {}
    for encoder in encoders:
        space = space_name(encoder.name)
        if space in found:
            raise ConfigError(
                f"encoders: {found[space].name} and {encoder.name} would both be called {space}"
            )
        found[space] = encoder
    known = {space_name(row): EncoderConfig(name=row) for row in REGISTRY} | found
    table = {name: Metric(name, kind, f"inception.{f}") for name, (kind, f) in INCEPTION.items()}
    table[CLIP] = Metric(CLIP, "clip_score", "clip.image")
    of_spaces = {
        f"{prefix}_{space}": Metric(f"{prefix}_{space}", kind, f"{space}.pool")
        for space in known
        for prefix, kind in PREFIXES.items()
    }
    if names is None:
        names = [n for n, m in of_spaces.items() if m.feature.partition(".")[0] in found]
        names = names or list(INCEPTION)
    table |= of_spaces
    own = {name: _own_metric(name) for name in names if is_own(name)}
    table |= own
    if twice := len(own) - len({metric.name for metric in own.values()}):
        raise ConfigError(f"metrics: {twice + 1} classes of one's own have the same name")
    for name in names:
        if name not in table:
            raise ConfigError(
                f"metrics: {name!r} is not known{nearest(name, table)}; allowed: "
                f"{', '.join([*INCEPTION, CLIP])}, and {', '.join(f'{p}_SPACE' for p in PREFIXES)} "
                f"of an encoder's space ({', '.join(found) or 'none is given'}), and "
                "FILE.py:CLASS of one's own"
            )
    chosen = [table[name] for name in dict.fromkeys(names)]
    spaces = {metric.feature.partition(".")[0] for metric in chosen}
    return chosen, [encoder for space, encoder in known.items() if space in spaces]


def _own_metric(spec: str) -> Metric:
    """Read the class of FILE.py:CLASS. Raises ConfigError."""
    made = own_code("evaluation.metrics", spec, "class")
    for method in ("features", "score"):
        if not callable(getattr(made, method, None)):
            raise ConfigError(f"evaluation.metrics: {spec}: has no method {method}")
    name = f"own_{spec.rpartition(':')[2]}"
    return Metric(name, "own", f"{name}.values", (made, spec))


@dataclass
class Side:
    """One of the two sets that are compared, as features; complete on the first rank alone.

    num: images, None where only statistics are known; gaussians and kept: by "space.feature";
    labels [K]: of the kept features' images.
    """

    num: int | None
    gaussians: dict[str, Gaussian] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    classes: Sequence[str] = ()


class SetEvaluator:
    """The extractors that some metrics need, and how two sets become numbers."""

    def __init__(
        self,
        metrics: Sequence[Metric],
        encoders: Sequence[EncoderConfig],
        world: World,
        *,
        inception_weights: str | None = None,
        clip: tuple[str, str | None] = ("ViT-L-14", "openai"),
    ) -> None:
        """Build them (collective). Raises ConfigError and WeightsError, on all ranks alike where
        the first meets it.
        """
        self.metrics, self.world = list(metrics), world
        self._owned: set[Path] = set()  # of a cache's files
        self._told: Path | None = None
        self.extractors: dict[str, Extractor] = {}
        spaces = {metric.feature.partition(".")[0] for metric in metrics}
        configs = {space_name(encoder.name): encoder for encoder in encoders}
        own = {metric.name: metric.own for metric in metrics if metric.own is not None}

        def make(space: str) -> None:
            if space == "inception":
                self.extractors[space] = Inception(inception_weights)
            elif space == "clip":
                self.extractors[space] = Clip(*clip)
            elif space in own:
                self.extractors[space] = OwnMetric(space, *own[space])
            else:
                self.extractors[space] = Encoder(configs[space])

        for space in sorted(spaces):
            of_rank_0(world, partial(make, space))
            if not world.is_rank_0:  # the first has downloaded what had to be
                make(space)

    def wanted(self, *, reference: bool, kept: frozenset[str] = frozenset()) -> Wanted:
        """Return the features that the metrics need of the reference, or of the samples."""

        def features(*kinds: Kind) -> frozenset[str]:
            return frozenset(m.feature for m in self.metrics if m.kind in kinds)

        pairs = features("kernel", "precision", "recall", "own")
        alone = frozenset() if reference else features(*OF_SAMPLES)
        return Wanted(features("frechet"), pairs | alone | kept)

    def check(self, source: ImageSource | Statistics, *, reference: bool) -> None:
        """Raises DataError where a side has not what a metric needs, before any of it is read."""
        for metric in self.metrics:
            if reference and metric.kind in OF_SAMPLES:
                continue
            if isinstance(source, Statistics):
                if metric.kind != "frechet" or metric.feature not in _inceptions(source.gaussians):
                    needs = "statistics of its features" if metric.kind == "frechet" else "images"
                    raise DataError(f"{metric.name}: needs {needs}, and {source.path} has none")
            elif source.num < (least := LEAST.get(metric.kind, 1)):
                side = "the reference has" if reference else "the samples are"
                raise DataError(f"{metric.name}: needs {least} images or more, {side} {source.num}")
            elif metric.name == CLIP and (source.labels is None or not source.classes):
                raise DataError(
                    f"{CLIP}: the samples have no class names; a run, a data set, class folders "
                    f"and what `fastrepa sample --classes` wrote have them"
                )

    def biased(self, num: int) -> list[Metric]:
        """The Frechet distances for which `num` images are few."""
        return [
            metric
            for metric in self.metrics
            if metric.kind == "frechet" and num < ENOUGH * self.width(metric)
        ]

    def width(self, metric: Metric) -> int:
        space, _, feature = metric.feature.partition(".")
        return self.extractors[space].widths[feature]

    def measure(
        self,
        source: ImageSource | Statistics,
        wanted: Wanted,
        *,
        batch_size: int = BATCH_SIZE,
        cache: StatisticsCache | None = None,
        progress: Callable[[int], None] = lambda images: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> Side:
        """A set's features, from `cache` where it has them (collective).

        Where another process is just making the same for the same cache, its end is waited for.
        """
        if isinstance(source, Statistics):
            return Side(None, _inceptions(source.gaussians))
        given = _inceptions(source.gaussians) if isinstance(source, AdmImages) else {}
        wanted = Wanted(wanted.moments - given.keys(), wanted.kept)
        if not wanted.spaces:  # no image need be looked at
            return Side(source.num, given)
        with ExitStack() as held:
            found = self._from_cache(source, wanted, cache)
            if found is None and cache is not None:
                while not of_rank_0(self.world, partial(self._owns, held, cache, source, wanted)):
                    on_all(self.world, partial(progress, 0))
                found = self._from_cache(source, wanted, cache)  # of who was before us
            if found is None:
                for extractor in self.extractors.values():
                    extractor.to(self.world.device)
                found = extract(
                    source,
                    self.extractors,
                    wanted,
                    world=self.world,
                    batch_size=min(batch_size, source.num),
                    progress=progress,
                )
                if self.world.is_rank_0 and cache is not None and (digest := source.digest()):
                    try:
                        for space in wanted.spaces:
                            cache.save(digest, self.extractors[space], found)
                    except OSError as error:
                        note(
                            f"{cache.folder}: cannot be written ({worded(error)}); nothing is kept"
                        )
        gaussians = {n: (m.mean, m.covariance) for n, m in found.moments.items()}
        labels = None if source.labels is None else source.labels[found.numbers]
        return Side(source.num, gaussians | given, found.kept, labels, source.classes)

    def _owns(
        self, held: ExitStack, cache: StatisticsCache, source: ImageSource, wanted: Wanted
    ) -> bool:
        """On the first rank, own the files of `cache` that are to be made until `held` ends. False
        after a moment where another process has one: the other ranks must not wait for long.
        """
        if (digest := source.digest()) is None:
            return True
        until = time.monotonic() + PATIENCE
        for space in sorted(wanted.spaces):  # in one order, so that none waits for the other
            path = cache.path(digest, self.extractors[space])
            while path not in self._owned:
                try:
                    release = take(cache.folder, "fastrepa evaluate", path.name)
                except OSError:  # saving will say so
                    return True
                except InUse as other:
                    if self._told != path:
                        print_warning(f"{other}; waiting for what it keeps there")
                    self._told = path
                    if time.monotonic() > until:
                        return False
                    time.sleep(0.5)
                    continue
                self._owned.add(path)
                held.callback(self._owned.discard, path)
                held.callback(release)
        return True

    def _from_cache(
        self, source: ImageSource, wanted: Wanted, cache: StatisticsCache | None
    ) -> FeatureSet | None:
        """All that is wanted, on the first rank; on the others an empty set (collective)."""
        found: list[FeatureSet] = []

        def look() -> bool:
            if cache is None or (digest := source.digest()) is None:
                return False
            for space in wanted.spaces:
                part = cache.load(digest, self.extractors[space], wanted.of(space))
                if part is None or part.num != source.num:
                    return False
                found.append(part)
            return True

        if not of_rank_0(self.world, look):
            return None
        whole = FeatureSet(source.num, {}, {})
        for part in found:
            whole.moments |= part.moments
            whole.kept |= part.kept
        return whole

    def scores(self, samples: Side, reference: Side) -> dict[str, float]:
        """Every metric by name, and NAME_std where it is a mean over parts; on the first rank.

        Raises DataError for features that are not finite, or of another width.
        """
        out: dict[str, float] = {}
        manifolds: dict[str, tuple[float, float]] = {}
        for metric in self.metrics:
            try:
                x = self._of(samples, metric)
                y = x if metric.kind in OF_SAMPLES else self._of(reference, metric)
                if metric.kind == "frechet":
                    out[metric.name] = frechet_distance(*x, *y)
                elif metric.kind == "kernel":
                    out[metric.name], out[f"{metric.name}_std"] = kernel_distance(x, y)
                elif metric.kind in ("precision", "recall"):
                    if metric.feature not in manifolds:
                        manifolds[metric.feature] = precision_recall(x, y)
                    out[metric.name] = manifolds[metric.feature][metric.kind == "recall"]
                elif metric.kind == "inception_score":
                    out[metric.name], out[f"{metric.name}_std"] = inception_score(x)
                elif metric.kind == "own":
                    measure = self.extractors[metric.name]
                    assert isinstance(measure, OwnMetric)
                    out[metric.name] = measure.score(x, y)
                else:
                    out[metric.name] = clip_score(x, self._texts(samples))
            except ValueError as error:
                raise DataError(f"{metric.name}: {error}") from None
        return out

    def _of(self, side: Side, metric: Metric) -> Any:
        """Return what the metric compares, of one side."""
        if metric.kind == "frechet":
            return side.gaussians[metric.feature]
        return side.kept[metric.feature].to(self.world.device)  # pairs are worth a GPU's time

    def _texts(self, side: Side) -> Tensor:
        clip = self.extractors["clip"]
        assert side.labels is not None and isinstance(clip, Clip)
        texts = clip.texts([PROMPT.format(name) for name in side.classes])
        return texts[side.labels].to(self.world.device)


def _inceptions(gaussians: Mapping[str, Gaussian]) -> dict[str, Gaussian]:
    return {f"inception.{name}": value for name, value in gaussians.items()}
