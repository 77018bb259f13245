"""The order of samples is a pure function, and the reader returns exactly the indexed bytes."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastrepa.data.index import load_index
from fastrepa.data.reader import SampleOrder, ShardReader
from fastrepa.data.shards import ShardSet
from fastrepa.errors import DataError
from tests.engine.data.trees import flip_byte

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=7)


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    n = order.num_samples
    return [order.locate(position) for position in range(epoch * n, (epoch + 1) * n)]


@given(sizes, st.integers(0, 2**40), st.integers(1, 9), st.integers(0, 10**6))
@settings(deadline=None)
def test_every_epoch_holds_every_sample_once(
    shard_sizes: list[int], seed: int, window: int, epoch: int
) -> None:
    order = SampleOrder(shard_sizes, seed=seed, window=window)
    everything = sorted((s, i) for s, size in enumerate(shard_sizes) for i in range(size))
    assert sorted(epoch_of(order, epoch)) == everything


@given(sizes, st.integers(1, 4), st.data())
@settings(deadline=None)
def test_order_does_not_depend_on_what_was_asked_before(
    shard_sizes: list[int], window: int, data: st.DataObject
) -> None:
    n = sum(shard_sizes)
    used = SampleOrder(shard_sizes, seed=5, window=window)
    for position in data.draw(st.lists(st.integers(0, 5 * n), max_size=20)):
        assert used.locate(position) == SampleOrder(shard_sizes, seed=5, window=window).locate(
            position
        )


def test_order_changes_with_epoch_and_seed_and_mixes_shards() -> None:
    shard_sizes = [50] * 12
    order = SampleOrder(shard_sizes, seed=0, window=4)
    first = epoch_of(order, 0)
    assert first != epoch_of(order, 1)
    assert first != epoch_of(SampleOrder(shard_sizes, seed=1, window=4), 0)
    # Reads stay near each other: 200 samples in a row come from four shards, well mixed.
    windows = [first[start : start + 200] for start in range(0, 600, 200)]
    assert [len({shard for shard, _ in window}) for window in windows] == [4, 4, 4]
    assert all(len({shard for shard, _ in window[:20]}) == 4 for window in windows)
    # Which shards share a window changes too.
    second = epoch_of(order, 1)
    together = [
        {frozenset(s for s, _ in e[i : i + 200]) for i in (0, 200, 400)} for e in (first, second)
    ]
    assert together[0] != together[1]


def test_order_is_the_same_on_every_machine() -> None:
    """Computed once and frozen: a run must resume in the same order after any update."""
    order = SampleOrder([3, 5, 2, 4], seed=7, window=2)
    assert [order.locate(p) for p in (0, 1, 2, 3, 13, 14, 27, 14 * 1000)] == FROZEN


FROZEN = [(1, 0), (3, 0), (3, 3), (1, 3), (2, 1), (2, 0), (0, 1), (0, 1)]


@given(
    world=st.integers(1, 8),
    micro=st.integers(1, 5),
    passes=st.integers(1, 3),
    start=st.integers(0, 50),
)
@settings(deadline=None)
def test_ranks_partition_every_step(world: int, micro: int, passes: int, start: int) -> None:
    """Rank by rank and pass by pass, a step is global_batch consecutive positions, each once."""
    order = SampleOrder([4, 3], seed=0, window=2)
    batch = world * micro * passes

    def reader(rank: int, start_step: int) -> ShardReader:
        return ShardReader(
            [], [], order, global_batch=batch, micro_batch=micro, rank=rank, world=world,
            start_step=start_step,
        )  # fmt: skip

    for step in (0, 1, 4):
        read = [
            reader(rank, start).position(step * passes + m, i)
            for rank in range(world)
            for m in range(passes)
            for i in range(micro)
        ]
        assert read == list(range((start + step) * batch, (start + step + 1) * batch))
    # Resumed at a later step = uninterrupted.
    late, early = reader(world - 1, start + 2), reader(world - 1, start)
    assert late.position(1, micro - 1) == early.position(2 * passes + 1, micro - 1)


@given(sizes, st.integers(1, 8), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_every_sample_once_per_epoch_over_all_ranks(
    shard_sizes: list[int], world: int, micro: int, passes: int
) -> None:
    order, n = SampleOrder(shard_sizes, seed=3, window=2), sum(shard_sizes)
    batch = world * micro * passes
    steps = -(-3 * n // batch)
    seen: Counter[tuple[int, tuple[int, int]]] = Counter()
    for rank in range(world):
        reader = ShardReader(
            [], [], order, global_batch=batch, micro_batch=micro, rank=rank, world=world
        )
        for k in range(steps * passes):
            for i in range(micro):
                position = reader.position(k, i)
                seen[position // n, order.locate(position)] += 1
    whole = {key: count for key, count in seen.items() if key[0] < 3}
    assert set(whole.values()) == {1}
    assert len(whole) == 3 * n


def reader_of(shards: ShardSet, **settings: int) -> ShardReader:
    order = SampleOrder(shards.shard_sizes, seed=0, window=settings.pop("window", 8))
    options = {"global_batch": 4, "micro_batch": 4, **settings}
    return ShardReader(shards.shard_paths, shards.index_paths, order, **options)


def test_reads_the_indexed_bytes_and_labels(make_set: Callable[..., ShardSet]) -> None:
    shards = make_set()
    reader = reader_of(shards)
    for position in range(shards.num_samples):
        shard, sample = reader.order.locate(position)
        image, label = reader.read(position)
        record = load_index(shards.index_paths[shard])[sample]
        assert image.dtype == np.uint8
        assert (label.dtype, label.shape, int(label)) == (np.int64, (), record["label"])
        assert Image.open(io.BytesIO(image.tobytes())).size == (16, 16)
    # DALI's way of asking: sample i of batch k.
    asked, _ = reader(SimpleNamespace(iteration=3, idx_in_batch=2))
    assert np.array_equal(asked, reader.read(14)[0])


def test_pickles_without_its_open_files(make_set: Callable[..., ShardSet]) -> None:
    reader = reader_of(make_set())
    before = reader.read(5)[0]
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert np.array_equal(copy.read(5)[0], before)
    assert np.array_equal(reader.read(5)[0], before)


def test_open_files_are_few(make_set: Callable[..., ShardSet]) -> None:
    shards = make_set(shard_size=2)  # 17 shards
    reader = reader_of(shards, window=2)
    for position in range(2 * shards.num_samples):
        reader.read(position)
        assert len(reader._open) <= 4


def test_flipped_byte_names_shard_and_sample(make_set: Callable[..., ShardSet]) -> None:
    shards = make_set()
    record = load_index(shards.index_paths[2])[5]
    flip_byte(shards.shard_paths[2], int(record["image_offset"] + record["image_size"] // 2))
    reader = reader_of(shards)
    bad = next(p for p in range(shards.num_samples) if reader.order.locate(p) == (2, 5))
    for position in range(shards.num_samples):
        if position != bad:
            reader.read(position)
    message = rf"shard-00002\.tar: sample {record['key'].decode()}: damaged"
    with pytest.raises(DataError, match=message):
        reader.read(bad)


def test_shard_truncated_or_removed_while_training(make_set: Callable[..., ShardSet]) -> None:
    shards = make_set()
    reader = reader_of(shards)
    position = next(p for p in range(34) if reader.order.locate(p) == (1, 7))
    reader.read(position)
    path: Path = shards.shard_paths[1]
    record = load_index(shards.index_paths[1])[7]
    with path.open("r+b") as file:
        file.truncate(int(record["image_offset"]) + 3)
    with pytest.raises(DataError, match=r"shard-00001\.tar: sample .*truncated"):
        reader.read(position)
    reader.close()
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.tar: No such file"):
        reader.read(position)


def test_batch_that_ranks_cannot_share() -> None:
    order = SampleOrder([3], seed=0, window=1)
    with pytest.raises(ValueError, match="no multiple"):
        ShardReader([], [], order, global_batch=10, micro_batch=4, world=2)
