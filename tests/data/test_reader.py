"""The order of samples is a pure function, and ranks share it whatever their number."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrepa.data.reader import RankBatches, SampleOrder
from fastrepa.errors import ConfigError

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=7)
Place = tuple[int, int]


def epoch_of(order: SampleOrder, epoch: int) -> list[Place]:
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


def test_dropped_remainders_differ_from_epoch_to_epoch() -> None:
    order = SampleOrder([4, 3], seed=0, window=2, multiple_of=5)
    kept = [frozenset(order.locate(5 * e + i) for i in range(5)) for e in range(20)]
    assert all(len(samples) == 5 for samples in kept)
    assert len(set(kept)) > 5
    # What is kept is the beginning of the same order, not another one.
    whole = SampleOrder([4, 3], seed=0, window=2)
    assert [order.locate(5 + i) for i in range(5)] == epoch_of(whole, 1)[:5]


def test_nothing_left_of_an_epoch() -> None:
    with pytest.raises(ConfigError, match=r"data\.remainder: 'drop' leaves nothing of 7 samples"):
        SampleOrder([4, 3], seed=0, window=2, multiple_of=8)


def read(order: SampleOrder, rank: RankBatches, batches: range) -> list[list[Place]]:
    return [[order.locate(p) for p in rank.positions(batch)] for batch in batches]


@given(
    shard_sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    window=st.integers(1, 7),
    seed=st.integers(0, 2**63),
    micro=st.integers(1, 4),
    sharing=st.sampled_from(
        [(1, 1), (1, 4), (2, 2), (4, 1), (8, 1), (3, 2), (6, 1), (5, 3), (7, 1)]
    ),
    drop=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_every_sample_once_and_one_order_for_any_ranks_and_resume(
    shard_sizes: list[int], window: int, seed: int, micro: int, sharing: tuple[int, int],
    drop: bool, data: st.DataObject,
) -> None:  # fmt: skip
    """Over all ranks; the same global order however it is shared; resumed = uninterrupted."""
    world, passes = sharing
    batch, n = world * passes * micro, sum(shard_sizes)
    options = {"seed": seed, "window": window, "multiple_of": batch if drop else 1}
    if drop and n < batch:
        with pytest.raises(ConfigError):
            SampleOrder(shard_sizes, **options)
        return
    epoch = n // batch * batch if drop else n
    steps = -(-2 * epoch // batch) + 1
    one = SampleOrder(shard_sizes, **options)
    stream = [
        place for step in read(one, RankBatches(batch, batch), range(steps)) for place in step
    ]

    # Uninterrupted, each rank with an order of its own, as in a process of its own.
    ranks = [
        read(
            SampleOrder(shard_sizes, **options),
            RankBatches(batch, micro, rank, world),
            range(steps * passes),
        )
        for rank in range(world)
    ]
    together = [
        place
        for step in range(steps)
        for rank in ranks
        for forward in rank[step * passes : (step + 1) * passes]
        for place in forward
    ]
    assert together == stream
    everything = {(s, i) for s, size in enumerate(shard_sizes) for i in range(size)}
    for number in range(2):
        seen = Counter(together[number * epoch : (number + 1) * epoch])
        assert set(seen.values()) == {1}
        assert seen.keys() <= everything and len(seen) == epoch

    # Stopped after some steps, and resumed with another rank count and micro batch.
    stop = data.draw(st.integers(0, steps - 1), label="stop")
    counts = [w for w in range(1, 9) if batch % w == 0]
    world = data.draw(st.sampled_from(counts), label="new world")
    micros = [m for m in range(1, batch + 1) if batch % (world * m) == 0]
    micro = data.draw(st.sampled_from(micros), label="new micro batch")
    passes = batch // (world * micro)
    rank = data.draw(st.integers(0, world - 1), label="rank")
    late = RankBatches(batch, micro, rank, world, start_step=stop)
    for k, places in enumerate(
        read(SampleOrder(shard_sizes, **options), late, range((steps - stop) * passes))
    ):
        step, numbers = late.step_and_numbers(k)
        assert step == stop + k // passes
        assert places == [stream[step * batch + number] for number in numbers]


def test_batch_that_ranks_cannot_share() -> None:
    with pytest.raises(ConfigError, match="global_batch: 10 is no multiple of 2 ranks"):
        RankBatches(10, 4, world=2)
