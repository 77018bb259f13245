"""The order of samples: a pure function (seed, epoch, position) -> sample.

The stream of a run is endless. Global position g means epoch, index = divmod(g, samples of an
epoch); within an epoch, `SampleOrder` visits every sample exactly once, in an order computed from
(seed, epoch). Which rank reads which position is arithmetic (`RankBatches`), so the order is the
same for any number of ranks, and resuming means starting at another step.

This module imports numpy only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastrepa.errors import ConfigError


class Order(Protocol):
    """Knows the sample at every position of an endless stream. Asked from one thread."""

    @property
    def num_samples(self) -> int: ...
    def locate(self, position: int) -> tuple[int, int]: ...


class SampleOrder:
    """A two-level permutation of all samples, fresh for every epoch.

    The shards are permuted; then the samples of each `window` consecutive permuted shards are
    permuted together. So reads stay near each other, and only one window is ever computed.

    Args:
        shard_sizes: samples of each shard.
        seed: of the order; one seed, one order, on every machine and numpy version.
        window: shards whose samples are shuffled together.
        multiple_of: every epoch is cut to a multiple of this, which leaves out the last samples
            of its order, other ones in every epoch; 1 leaves out none.

    Raises ConfigError when an epoch cut so would be empty.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, seed: int, window: int, multiple_of: int = 1
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.epoch_samples = self.num_samples // multiple_of * multiple_of
        if not self.epoch_samples:
            raise ConfigError(
                f"data.remainder: 'drop' leaves nothing of {self.num_samples} samples in batches of"
                f" {multiple_of}; use 'include' or a smaller training.global_batch"
            )
        self.seed = seed
        self.window = window
        self._epochs: OrderedDict[int, tuple[np.ndarray, list[int]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, sample within it) at a global position >= 0 of the endless stream."""
        epoch, index = divmod(position, self.epoch_samples)
        _, starts = self._epoch(epoch)
        window = bisect_right(starts, index) - 1
        shard, sample = self._window(epoch, window)[index - starts[window]]
        return int(shard), int(sample)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The epoch's shard order [shards] and the first index of each of its windows."""
        if epoch not in self._epochs:
            shards = self._permutation(len(self.shard_sizes), epoch, 0)
            sizes = np.add.reduceat(
                self.shard_sizes[shards], np.arange(0, len(shards), self.window)
            )
            starts = [0, *np.cumsum(sizes)[:-1].tolist()]
            _keep_last(self._epochs, epoch, (shards, starts), 2)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Return (shard, sample) of every place in a window: int64 [samples in the window, 2]."""
        if (epoch, window) not in self._windows:
            shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
            sizes = self.shard_sizes[shards]
            table = np.stack(
                [np.repeat(shards, sizes), np.concatenate([np.arange(size) for size in sizes])], 1
            )
            table = table[self._permutation(len(table), epoch, window + 1)]
            # Two: a batch may straddle the end of a window.
            _keep_last(self._windows, (epoch, window), table, 2)
        return self._windows[epoch, window]

    def _permutation(self, n: int, epoch: int, stream: int) -> np.ndarray:
        """A permutation of range(n), from Philox's raw stream, which numpy keeps stable."""
        # The lowest word of the counter runs with the draws; epoch and stream fill the others.
        counter = np.array([0, epoch, stream, 0], dtype=np.uint64)
        key = np.array([self.seed % 2**64, 0], dtype=np.uint64)
        philox = np.random.Philox(key=key, counter=counter)
        return np.argsort(philox.random_raw(n), kind="stable")


@dataclass(frozen=True)
class RankBatches:
    """Knows which rank takes which positions of the stream.

    With A = global_batch / (world * micro_batch) forward passes per step, batch k of rank r belongs
    to step start_step + k // A and is its pass m = k % A; its i-th sample is number
    (r * A + m) * micro_batch + i of that step.
    """

    global_batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    start_step: int = 0

    def __post_init__(self) -> None:
        if self.global_batch % (self.world * self.micro_batch):
            raise ConfigError(
                f"training.global_batch: {self.global_batch} is no multiple of {self.world} ranks"
                f" times a micro batch of {self.micro_batch}"
            )

    @property
    def passes(self) -> int:
        """A, forward passes per step."""
        return self.global_batch // (self.world * self.micro_batch)

    def step_and_numbers(self, batch: int) -> tuple[int, range]:
        """The step of this rank's batch number `batch` (from 0), and its samples' numbers in it.

        Number n of a step stands at global position step * global_batch + n.
        """
        step, forward = divmod(batch, self.passes)
        first = (self.rank * self.passes + forward) * self.micro_batch
        return self.start_step + step, range(first, first + self.micro_batch)

    def positions(self, batch: int) -> range:
        """Global positions of this rank's batch number `batch`."""
        step, numbers = self.step_and_numbers(batch)
        first = step * self.global_batch + numbers.start
        return range(first, first + self.micro_batch)


def _keep_last(cache: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
