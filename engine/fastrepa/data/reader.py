"""The reader: a pure function (seed, epoch, position) -> sample, and the bytes of that sample.

The stream of a run is endless. Global position g means epoch, index = divmod(g, samples); within
an epoch, `SampleOrder` visits every sample exactly once, in an order computed from (seed, epoch).
Which rank reads which position is arithmetic (`ShardReader.position`), so the order is the same for
any number of ranks, and resuming means starting at another step.

numpy only, no torch: DALI's worker processes import this module.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastrepa.data.index import load_index
from fastrepa.data.spawn import end_with_parent
from fastrepa.errors import DataError


class SampleOrder:
    """A two-level permutation of all samples, fresh for every epoch.

    The shards are permuted; then the samples of each `window` consecutive permuted shards are
    permuted together. So reads stay near each other, and only one window is ever computed.

    Args:
        shard_sizes: samples of each shard.
        seed: of the order; one seed, one order, on every machine and numpy version.
        window: shards whose samples are shuffled together.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.seed = seed
        self.window = window
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, sample within the shard) at a global position >= 0 of the endless stream."""
        epoch, index = divmod(position, self.num_samples)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, index, side="right")) - 1
        shard, sample = self._window(epoch, window)[index - starts[window]]
        return int(shard), int(sample)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard order [shards] and the first index of each of its windows."""
        if epoch not in self._epochs:
            shards = self._permutation(len(self.shard_sizes), epoch, 0)
            sizes = np.add.reduceat(
                self.shard_sizes[shards], np.arange(0, len(shards), self.window)
            )
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            _keep_last(self._epochs, epoch, (shards, starts), 2)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """(shard, sample) of every place in a window: int64 [samples in the window, 2]."""
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


class SampleInfo(Protocol):
    """What DALI tells a per-sample source (nvidia.dali.types.SampleInfo)."""

    @property
    def iteration(self) -> int: ...
    @property
    def idx_in_batch(self) -> int: ...


class _OpenShard(NamedTuple):
    descriptor: int
    records: np.ndarray


class ShardReader:
    """Reads the encoded samples of one rank, in order: the source of DALI's `external_source`.

    With A = global_batch / (world * micro_batch) forward passes per step, batch k of rank r belongs
    to step start_step + k // A and is its pass m = k % A; its i-th sample is global position
    step * global_batch + (r * A + m) * micro_batch + i.

    Picklable; files are opened when first needed, in the process that reads them.
    """

    def __init__(
        self,
        shard_paths: Sequence[Path],
        index_paths: Sequence[Path],
        order: SampleOrder,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> None:
        if global_batch % (world * micro_batch):
            raise ValueError(f"{global_batch=} is no multiple of {world=} times {micro_batch=}")
        self.shard_paths = [Path(path) for path in shard_paths]
        self.index_paths = [Path(path) for path in index_paths]
        self.order = order
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.passes = global_batch // (world * micro_batch)
        self.start_step = start_step
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def position(self, batch: int, i: int) -> int:
        """Global position of sample i of this rank's batch number `batch` (from 0)."""
        step, forward = divmod(batch, self.passes)
        first = (self.start_step + step) * self.global_batch
        return first + (self.rank * self.passes + forward) * self.micro_batch + i

    def read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """(encoded image uint8 [bytes], label int64 []) at a global position.

        Raises DataError, naming shard and sample, when the bytes are not the prepared ones.
        """
        shard, sample = self.order.locate(position)
        descriptor, records = self._shard(shard)
        record = records[sample]
        size = int(record["image_size"])
        where = f"{self.shard_paths[shard]}: sample {record['key'].decode()}"
        try:
            data = os.pread(descriptor, size, int(record["image_offset"]))
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise DataError(f"{where}: the shard ends inside it (truncated)")
        if zlib.crc32(data) != record["image_crc32"]:
            raise DataError(f"{where}: damaged (its CRC-32 is not the index's)")
        return np.frombuffer(data, dtype=np.uint8), np.array(record["label"], dtype=np.int64)

    def __call__(self, info: SampleInfo) -> tuple[np.ndarray, np.ndarray]:
        return self.read(self.position(info.iteration, info.idx_in_batch))

    def close(self) -> None:
        """Close every open shard; reading again opens them again."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Unpickled, it is in one of DALI's workers, which by themselves outlive a killed parent.
        end_with_parent()

    def _shard(self, shard: int) -> _OpenShard:
        if shard not in self._open:
            records = load_index(self.index_paths[shard])
            try:
                descriptor = os.open(self.shard_paths[shard], os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{self.shard_paths[shard]}: {error.strerror}") from None
            # The window being read and the one before it, which a batch may straddle.
            if len(self._open) >= 2 * self.order.window:
                os.close(self._open.popitem(last=False)[1].descriptor)
            self._open[shard] = _OpenShard(descriptor, records)
        return self._open[shard]


def _keep_last(cache: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
