"""Evaluation while training goes on: the same images' seeds and labels each time, on all ranks.

Everything random in it is keyed (fastrepa.randomness) or seeded apart, so a run's weights do not
depend on whether, or how often, it was evaluated. Who measures is handed in: training reads nothing
of metrics and their networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from fastrepa.checkpoint.averages import ema_model
from fastrepa.checkpoint.host_tensors import first_not_finite
from fastrepa.checkpoint.kinds import Whole
from fastrepa.config import Config
from fastrepa.generation.generate import rank_batches
from fastrepa.model.sit import SiT
from fastrepa.runtime.world import World, of_rank_0
from fastrepa.vision.codec import Codec


class Evaluator(Protocol):
    """Measures a model's images against the run's reference; every method is collective."""

    def first_words(self) -> list[str]:
        """Return lines to be read before the first of the metrics is seen."""

    def prepare(self, *, alive: Callable[[], None], warn: Callable[[str], None]) -> None:
        """Have the reference measured; `alive` is called after every batch."""

    def scores(self, model: SiT | None, *, alive: Callable[[], None]) -> dict[str, float]:
        """Metrics by name, on all ranks; `model` is None on a rank that has no images to make.

        Raises DataError for features that are not finite.
        """


MakeEvaluator = Callable[[Config, World, Codec, list[str], list[int]], Evaluator]
"""Of a run's configuration, its ranks, its codec, the names of its classes and the numbers of those
that have images (collective)."""


class Evaluations:
    """A run's evaluations: when they are due, by its `evaluation` section, and their scores."""

    def __init__(
        self, config: Config, world: World, codec: Codec, evaluator: Evaluator | None
    ) -> None:
        self.config, self.world, self.codec = config, world, codec
        self.settings, self.evaluator = config.evaluation, evaluator
        self._latest: tuple[int, dict[str, float]] = (0, {})

    def due(self, step: int) -> bool:
        return bool(self.settings.every) and (
            step % self.settings.every == 0 or step == self.config.training.steps
        )

    def at(self, step: int) -> dict[str, float]:
        """The scores measured at this very step, if it was."""
        return self._latest[1] if self._latest[0] == step else {}

    def first_words(self) -> list[str]:
        """Return what there is to know of the metrics before the first of them is seen."""
        return self.evaluator.first_words() if self.evaluator else []

    def measure(
        self,
        step: int,
        whole: Whole,
        fixed: Mapping[str, Tensor],
        *,
        alive: Callable[[], None],
        warn: Callable[[str], None],
    ) -> dict[str, float]:
        """Scores of the averaged weights, by name, on all ranks (collective).

        fixed: what is not trained, by name, each [...] as the model has it. `alive` is called after
        every batch. Weights that are not finite (they draw black images) are a warning and no
        scores. Raises DataError for features that are not finite.
        """
        evaluator, settings, world = self.evaluator, self.settings, self.world
        assert evaluator is not None
        evaluator.prepare(alive=alive, warn=warn)
        mine = rank_batches(settings.num, settings.batch_size, world.rank, world.size)
        with ema_model(self.config, whole, fixed, self.codec, world, needed=bool(mine)) as model:
            weights = {} if model is None else model.state_dict()
            bad = of_rank_0(world, lambda: first_not_finite(weights))  # it has images, if any has
            if bad:
                warn(f"step {step}: the average of {bad} is not finite: nothing is measured")
            scores = {} if bad else evaluator.scores(model, alive=alive)
        self._latest = (step, scores)
        return scores
