"""The evaluator that `fastrepa train` hands into a run that wants to be evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastrepa.checkpoint.choice import can_draw
from fastrepa.commands.evaluate.evaluator import SetEvaluator, Side, choose_metrics
from fastrepa.commands.evaluate.feature_sets import StatisticsCache
from fastrepa.commands.evaluate.image_sources import Generated, open_stored
from fastrepa.config import Config
from fastrepa.data.datasets import located
from fastrepa.errors import ConfigError
from fastrepa.generation.generate import default_labels
from fastrepa.runtime.world import World, of_rank_0
from fastrepa.vision.codec import Codec


class RunEvaluator:
    """The metrics of `evaluation` for one run (training/evaluation.py says what is asked of it).

    Building it reads the extractors' weights (collective): what is missing is an error before the
    first step. Features of the reference are made, or found beside it, when they are first needed.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        codec: Codec,
        classes: list[str],
        drawn: Sequence[int] | None = None,
    ) -> None:
        """drawn: numbers of the classes that take turns; None: all of `classes`."""
        self.config, self.world, self.codec, self.classes = config, world, codec, classes
        self.drawn = range(len(classes)) if drawn is None else drawn
        self.settings = config.evaluation
        self._reference: Side | None = None
        metrics, encoders = choose_metrics(self.settings.metrics, self.settings.encoders)
        self._path = located(self.settings.reference or config.data.path)
        if can_draw(self._path):
            raise ConfigError(
                f"evaluation.reference: {self._path} is a run; allowed are a data set, a folder of "
                f"images and an npz"
            )
        self._source = open_stored(self._path)
        self._evaluator = SetEvaluator(
            metrics, encoders, world, inception_weights=self.settings.inception_weights
        )
        self._evaluator.check(self._source, reference=True)
        self._evaluator.check(self._images(None), reference=False)

    def first_words(self) -> list[str]:
        """Name the metrics that come out too great of so few images."""
        return [
            f"{metric.name}: {self.settings.num:,} images are few for "
            f"{self._evaluator.width(metric):,} dimensions, so it comes out too great; compare it "
            f"with that of equally many"
            for metric in self._evaluator.biased(self.settings.num)
        ]

    def prepare(self, *, alive: Callable[[], None], warn: Callable[[str], None]) -> None:
        """Measure the reference, once."""
        if self._reference is None:
            self._reference = self._evaluator.measure(
                self._source,
                self._evaluator.wanted(reference=True),
                batch_size=self.settings.batch_size,
                cache=StatisticsCache.beside(self._path),
                progress=lambda images: alive(),
                note=warn,
            )

    def scores(self, model: Any, *, alive: Callable[[], None]) -> dict[str, float]:
        """Metrics of the images that `model` draws, by name, on all ranks."""
        samples = self._evaluator.measure(
            self._images(model),
            self._evaluator.wanted(reference=False),
            batch_size=self.settings.batch_size,
            progress=lambda images: alive(),
        )
        reference = self._reference
        assert reference is not None
        return of_rank_0(self.world, lambda: self._evaluator.scores(samples, reference))

    def _images(self, model: Any) -> Generated:
        settings, config = self.settings, self.config
        return Generated(
            model,
            self.codec,
            default_labels(settings.num, len(self.classes), self.drawn),
            self.classes,
            seed=config.seed,
            batch_size=min(settings.batch_size, settings.num),
            sample_config=config.sample,
            path=config.objective.path,
            null_label=config.model.num_classes,
        )
