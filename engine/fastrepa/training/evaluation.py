"""Evaluation while training goes on: the same images' seeds and labels each time, on all ranks.

Everything random in it is keyed (fastrepa.randomness) or seeded apart, so a run's weights do not
depend on whether, or how often, it was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastrepa.checkpoint.averages import ema_model
from fastrepa.commands.evaluate.evaluator import Evaluator, Side, choose_metrics
from fastrepa.commands.evaluate.feature_sets import StatisticsCache
from fastrepa.commands.evaluate.image_sources import Generated, is_run, open_stored
from fastrepa.config import Config
from fastrepa.errors import ConfigError
from fastrepa.generation.generate import default_labels, rank_batches
from fastrepa.runtime.world import World, of_first_rank
from fastrepa.training.zero.engine import WholeTensors
from fastrepa.vision.codec import Codec


class Evaluations:
    """A run's evaluations, as `evaluation` in its configuration says.

    Building it reads the extractors' weights (collective): what is missing is an error before the
    first step. Features of the reference are made, or found beside it, when they are first needed.
    """

    def __init__(self, config: Config, world: World, codec: Codec, classes: list[str]) -> None:
        self.config, self.world, self.codec, self.classes = config, world, codec, classes
        self.settings = config.evaluation
        self._evaluator: Evaluator | None = None
        self._reference: Side | None = None
        self._latest: tuple[int, dict[str, float]] = (0, {})
        if not self.settings.every:
            return
        metrics, encoders = choose_metrics(self.settings.metrics, self.settings.encoders)
        self._path = Path(self.settings.reference or config.data.path)
        if is_run(self._path):
            raise ConfigError(
                f"evaluation.reference: {self._path} is a run; allowed are a data set, a folder of "
                f"images and an npz"
            )
        self._source = open_stored(self._path)
        self._evaluator = Evaluator(
            metrics, encoders, world, inception_weights=self.settings.inception_weights
        )
        self._evaluator.check(self._source, reference=True)
        self._evaluator.check(self._images(None), reference=False)

    def due(self, step: int) -> bool:
        return bool(self.settings.every) and (
            step % self.settings.every == 0 or step == self.config.training.steps
        )

    def at(self, step: int) -> dict[str, float]:
        """The scores measured at this very step, if it was."""
        return self._latest[1] if self._latest[0] == step else {}

    def first_words(self) -> list[str]:
        """What there is to know of the metrics before the first of them is seen."""
        if self._evaluator is None:
            return []
        return [
            f"{metric.name}: {self.settings.num:,} images are few for "
            f"{self._evaluator.width(metric):,} dimensions, so it comes out too great; compare it "
            f"with that of equally many"
            for metric in self._evaluator.biased(self.settings.num)
        ]

    def measure(
        self,
        step: int,
        whole: WholeTensors,
        fixed: Mapping[str, Tensor],
        *,
        alive: Callable[[], None],
        warn: Callable[[str], None],
    ) -> dict[str, float]:
        """Scores of the averaged weights, by name, on all ranks (collective).

        `alive` is called after every batch. Raises DataError for features that are not finite.
        """
        evaluator, num = self._evaluator, self.settings.num
        assert evaluator is not None
        if self._reference is None:
            self._reference = evaluator.measure(
                self._source,
                evaluator.wanted(reference=True),
                batch_size=self.settings.batch_size,
                cache=StatisticsCache.beside(self._path),
                progress=lambda images: alive(),
                note=warn,
            )
        mine = rank_batches(num, self.settings.batch_size, self.world.rank, self.world.size)
        with ema_model(
            self.config, whole, fixed, self.codec, self.world, needed=bool(mine)
        ) as model:
            samples = evaluator.measure(
                self._images(model),
                evaluator.wanted(reference=False),
                batch_size=self.settings.batch_size,
                progress=lambda images: alive(),
            )
        reference = self._reference
        scores = of_first_rank(self.world, lambda: evaluator.scores(samples, reference))
        self._latest = (step, scores)
        return scores

    def _images(self, model: Any) -> Generated:
        settings, config = self.settings, self.config
        return Generated(
            model,
            self.codec,
            default_labels(settings.num, len(self.classes)),
            self.classes,
            seed=config.seed,
            batch_size=min(settings.batch_size, settings.num),
            sample_config=config.sample,
            path=config.objective.path,
            null_label=config.model.num_classes,
        )
