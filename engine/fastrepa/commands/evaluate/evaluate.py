"""`fastrepa evaluate SAMPLES REFERENCE`: two sets of images, or what is known of them, compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastrepa.checkpoint.choice import NEWEST, Wanted, can_draw, is_export
from fastrepa.checkpoint.identity import check_classes, other_samples, trained_classes
from fastrepa.commands.evaluate.evaluator import (
    BATCH_SIZE,
    ENOUGH,
    Metric,
    SetEvaluator,
    Side,
    choose_metrics,
)
from fastrepa.commands.evaluate.feature_sets import StatisticsCache
from fastrepa.commands.evaluate.feature_sets import save_statistics as write_statistics
from fastrepa.commands.evaluate.image_sources import (
    STATISTICS,
    AdmImages,
    Generated,
    Statistics,
    Stills,
    missing_images,
    open_stored,
)
from fastrepa.commands.evaluate.metrics import frechet_bias
from fastrepa.commands.evaluate.record import evaluation_record, keep_beside
from fastrepa.config import EncoderConfig, run_folder
from fastrepa.data.datasets import is_data, located, open_data
from fastrepa.errors import ConfigError, DataError
from fastrepa.generation.generate import default_labels
from fastrepa.generation.loading import (
    draw_options,
    load_generator,
    ready_to_sample,
    with_settings,
)
from fastrepa.runtime.ownership import owned
from fastrepa.runtime.progress import Bar
from fastrepa.runtime.world import World, destroy_world, init_or_alone, of_rank_0
from fastrepa.vision.codec import build_codec


@dataclass(frozen=True)
class Evaluation:
    """The findings of `evaluate`; `settings` are those of a run's images."""

    samples: str
    reference: str
    num_samples: int | None
    num_reference: int | None
    metrics: tuple[Metric, ...]
    scores: dict[str, float]
    notes: tuple[str, ...]
    extractors: dict[str, str]
    settings: dict[str, Any]
    seconds: float
    is_rank_0: bool


def evaluate(
    samples: Path,
    reference: Path,
    *,
    metrics: Sequence[str] | None = None,
    encoders: Sequence[EncoderConfig] = (),
    inception_weights: str | None = None,
    clip: tuple[str, str | None] = ("ViT-L-14", "openai"),
    batch_size: int = BATCH_SIZE,
    cache: Path | None = None,
    save_statistics: Path | None = None,
    seed: int = 0,
    wanted: Wanted = NEWEST,
    **settings: Any,
) -> Evaluation:
    """Compare two sets; under torchrun every process calls this and does a share.

    `cache`: folder for what is kept of the reference, by default one beside it. `save_statistics`:
    an npz of the reference's to write. seed, wanted and settings (keys of SampleConfig) are of the
    images that a run, a checkpoint of it or an export generates for this. What is found of a run's
    images is also added to RUN/evaluations.jsonl.
    Raises FastrepaError.
    """
    started = time.perf_counter()
    if batch_size < 1:
        raise ConfigError(f"--batch-size: {batch_size} is less than 1")
    chosen, needed = choose_metrics(metrics, encoders)
    world = init_or_alone()
    notes: list[str] = []
    record: dict[str, Any] = {}

    def open_source(path: Path, other: Path) -> Any:
        if not can_draw(path):
            return _opened(path, notes)
        return _run_source(
            path, other, world, record, notes, batch_size, seed=seed, wanted=wanted, **settings
        )

    sources = [open_source(samples, reference), open_source(reference, samples)]
    if not record:
        _refuse_given(wanted, settings)
    evaluator = SetEvaluator(chosen, needed, world, inception_weights=inception_weights, clip=clip)
    for source, is_reference in zip(sources, (False, True), strict=True):
        evaluator.check(source, reference=is_reference)
    few = [] if sources[0].num is None else evaluator.biased(sources[0].num)

    def measure(source: Any, path: Path, cache: StatisticsCache | None) -> Side:
        kept = frozenset() if cache is not None else frozenset(metric.feature for metric in few)
        shown = world.is_rank_0 and source.num is not None
        with Bar(path.name, source.num or 0, "images", shown=shown) as bar:
            wanted = evaluator.wanted(reference=cache is not None, kept=kept)
            return evaluator.measure(
                source, wanted, batch_size=batch_size, cache=cache, note=notes.append,
                progress=lambda images: bar.advance(images * world.size),  # all are as far as this
            )  # fmt: skip

    kept = StatisticsCache(cache) if cache else StatisticsCache.beside(reference)

    def compare() -> dict[str, float]:
        scores = evaluator.scores(*sides)
        for metric in few:
            notes.append(_bias_note(evaluator, metric, *sides))
        if save_statistics is not None:
            write_statistics(save_statistics, sides[1].gaussians)
        return scores

    with ExitStack() as held:
        if save_statistics is not None:  # what cannot be written is said before the work
            place, name = save_statistics.parent, save_statistics.name
            mine = owned(place, "fastrepa evaluate", DataError, file=name)
            of_rank_0(world, lambda: held.enter_context(mine))
            _check_statistics(save_statistics, chosen, sources[1])
        sides = [measure(sources[0], samples, None), measure(sources[1], reference, kept)]
        scores = of_rank_0(world, compare)
    if world.size > 1:
        destroy_world()
    done = Evaluation(
        str(samples), str(reference), sides[0].num, sides[1].num,
        tuple(chosen), scores, tuple(notes),
        {name: extractor.identity for name, extractor in evaluator.extractors.items()},
        record, time.perf_counter() - started, world.is_rank_0,
    )  # fmt: skip
    if world.is_rank_0 and can_draw(samples) and not is_export(samples):
        problem = keep_beside(run_folder(samples), evaluation_record(done))
        return replace(done, notes=(*notes, problem)) if problem else done
    return done


def _refuse_given(wanted: Wanted, settings: dict[str, Any]) -> None:
    """Raises ConfigError for what is said of a run's images where there are none."""
    options = {"step": wanted.step, "ema": wanted.ema, **settings}
    given = [f"--{k.replace('_', '-')}" for k, v in options.items() if v is not None]
    if words := [*given, *wanted.overrides]:
        raise ConfigError(f"{words[0]}: is for a run, and neither side is one")


def _opened(path: Path, notes: list[str]) -> Stills | AdmImages | Statistics:
    """Open what is stored at `path`; `notes` are told of images that are missing there."""
    found = open_stored(path)
    if isinstance(found, Stills):
        notes.extend(missing_images(path, found.num))
    return found


def _check_statistics(path: Path, metrics: Sequence[Metric], reference: Any) -> None:
    """Raises DataError where there will be none to save, before the work."""
    features = [f"inception.{feature}" for feature in STATISTICS]
    made = any(metric.kind == "frechet" and metric.feature in features for metric in metrics)
    if not made and not getattr(reference, "gaussians", None):
        raise DataError(f"{path}: statistics are those of fid and sfid, and neither is asked for")


def _bias_note(evaluator: SetEvaluator, metric: Metric, samples: Side, reference: Side) -> str:
    """Few images for a Frechet distance, and how much that adds, from halves of the samples."""
    features, width = samples.kept[metric.feature], evaluator.width(metric)
    text = (
        f"{metric.name}: {samples.num:,} images are few for {width:,} dimensions "
        f"({ENOUGH * width:,} would do): it comes out too great"
    )
    if len(features) < 4:  # halves of one
        return text
    bias = frechet_bias(features, *reference.gaussians[metric.feature])
    return f"{text}, by about {bias:.4g} (halves of the images say); compare equal numbers only"


def _run_source(
    run: Path,
    other: Path,
    world: World,
    record: dict[str, Any],
    notes: list[str],
    batch_size: int,
    *,
    seed: int,
    wanted: Wanted,
    **settings: Any,
) -> Generated:
    """A run's images as `fastrepa sample` would draw them; `record` is told how.

    Where `other`, which they are compared with, is the run's own set, it must have its classes, and
    `notes` are told if it holds other images than it did.
    """
    loaded = load_generator(run, world, world.device, wanted)
    info, config = loaded.state, with_settings(loaded.config, settings)
    model = ready_to_sample(loaded.model, config.sample, config.training, world.device)
    if is_data(other) and other.resolve() == located(config.data.path).resolve():
        data = open_data(other, verify="sizes")
        check_classes(info, data)
        notes.extend(other_samples(info, data))
    record.update(
        checkpoint_step=info.step,
        ema=loaded.ema,
        seed=seed,
        **config.sample.model_dump(),
    )
    codec = build_codec(config.data.codec, resolution=config.data.resolution, device=world.device)
    drawn = trained_classes(info, len(info.classes) or config.model.num_classes)
    return Generated(
        model,
        codec,
        default_labels(config.sample.num, config.model.num_classes, drawn),
        info.classes,
        seed=seed,
        batch_size=min(batch_size, config.sample.num),
        **draw_options(config, info),
    )
