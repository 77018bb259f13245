"""The readers put into a batch what is stored, checked, through few descriptors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.format.store import OpenFiles, ShardStore, Slots, read_exactly
from fastrepa.errors import DataError
from tests.sets import written
from tests.sets.trees import flip_byte

COLUMNS = {"latents": 2, "encoders": {"one": 2, "two": 1}}


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return written.write_set(tmp_path / "set", **COLUMNS)


def slots(places: list[tuple[int, int]], views: list[int], features: int = 1) -> Slots:
    b, t = len(places), written.GRID**2
    return Slots(
        places,
        views,
        label=np.full(b, -1),
        encoded=[None] * b,
        moments=np.zeros((b, 2 * written.CHANNELS, written.SIDE, written.SIDE), np.float16),
        features=tuple(
            (np.zeros((b, t), np.float16), np.zeros((b, t, written.WIDTH), np.int8))
            for _ in range(features)
        ),
    )


def store(shards: ShardSet, **options: object) -> ShardStore:
    wanted = {"image": True, "moments": True, "features": ["one"], "open_shards": 2, **options}
    return shards.store(**wanted)  # type: ignore[arg-type]


def test_every_field_of_every_sample_and_view(shards: ShardSet) -> None:
    places = [(s, i) for s, size in enumerate(shards.shard_sizes) for i in range(size)]
    reader = store(shards)
    for view in (0, 1):
        batch = slots(places, [view] * len(places))
        for number, (shard, sample) in enumerate(places):
            reader.fill(batch, number)
            record = load_index(shards.index_paths[shard])[sample]
            raw = shards.shard_paths[shard].read_bytes()
            start = int(record["image_offset"])
            assert batch.encoded is not None and batch.moments is not None
            assert batch.encoded[number].tobytes() == raw[start : start + record["image_size"]]
            assert batch.label[number] == written.label(number)
            assert (batch.moments[number] == written.moments(number, view)).all()
            assert (batch.features[0][0][number] == written.scale(number, view)).all()
            assert (batch.features[0][1][number] == written.tokens(number, view)).all()
            assert reader.name(shard, sample).endswith(f".tar: sample {number:08d}")


def test_only_what_is_wanted_is_opened(shards: ShardSet) -> None:
    for path in (*shards.shard_paths, *shards.path.glob("*.moments.npy")):
        path.unlink()
    reader = store(shards, image=False, moments=False, features=["two"])
    batch = slots([(1, 3)], [0])
    batch.encoded = batch.moments = None
    reader.fill(batch, 0)
    assert (batch.features[0][1][0] == written.tokens(11, 0)).all()


def test_open_files_are_few_and_close(tmp_path: Path) -> None:
    shards = written.write_set(tmp_path / "many", shard_size=2, **COLUMNS)  # 17 shards
    reader = store(shards)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for shard in range(17):
            reader.fill(slots([(shard, 1)], [0]), 0)
            assert len(os.listdir("/proc/self/fd")) - before <= 2 * 3  # two shards, three files
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    reader.fill(slots([(0, 1)], [0]), 0)  # opens them again


def test_threads_share_few_descriptors(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(12)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100)
    files, wrong = OpenFiles(3), []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 12, 300):
            with files.use(paths[i], lambda: "?") as descriptor:
                if os.pread(descriptor, 100, 0) != bytes([i]) * 100:
                    wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(files) <= 3
    files.close()
    assert len(files) == 0


@pytest.mark.parametrize("pieces", [1, 3, 7, 1000])
def test_file_systems_that_answer_in_pieces(
    tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(50)))
    whole = os.preadv

    def some(descriptor: int, parts: list[memoryview], offset: int) -> int:
        return whole(descriptor, [parts[0][:pieces]], offset)

    monkeypatch.setattr(os, "preadv", some)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    parts = [bytearray(4), bytearray(0), bytearray(9), bytearray(2)]
    assert read_exactly(descriptor, [memoryview(part) for part in parts], 30)
    assert b"".join(parts) == bytes(range(30, 45))
    assert not read_exactly(descriptor, [memoryview(part) for part in parts], 36)
    os.close(descriptor)


def test_flipped_byte_names_shard_and_sample(shards: ShardSet) -> None:
    record = load_index(shards.index_paths[2])[5]
    flip_byte(shards.shard_paths[2], int(record["image_offset"] + record["image_size"] // 2))
    reader = store(shards)
    for sample in (4, 6):
        reader.fill(slots([(2, sample)], [0]), 0)
    with pytest.raises(DataError, match=r"shard-00002\.tar: sample 00000021: damaged"):
        reader.fill(slots([(2, 5)], [0]), 0)


@pytest.mark.parametrize("column", ["moments", "features.one"])
@pytest.mark.parametrize("place", ["first byte", "checksum"])
def test_damaged_row_names_file_sample_and_view(shards: ShardSet, column: str, place: str) -> None:
    path = shards.path / f"shard-00001.{column}.npy"
    rows = np.load(path, mmap_mode="r")
    size = rows.dtype.itemsize
    at = rows.offset + (6 * 2 + 1) * size  # type: ignore[attr-defined]  # sample 6, view 1
    flip_byte(path, at if place == "first byte" else at + size - 1)
    reader = store(shards)
    for good in (((1, 6), 0), ((1, 5), 1), ((1, 7), 0)):
        reader.fill(slots([good[0]], [good[1]]), 0)
    named = rf"shard-00001\.{column}\.npy: sample 00000014 \(row 6, view 1\): damaged"
    with pytest.raises(DataError, match=named):
        reader.fill(slots([(1, 6)], [1]), 0)


def test_files_that_shrink_or_vanish_while_training(shards: ShardSet) -> None:
    reader = store(shards)
    reader.fill(slots([(1, 7)], [0]), 0)
    path = shards.shard_paths[1]
    record = load_index(shards.index_paths[1])[7]
    os.truncate(path, int(record["image_offset"]) + 3)
    with pytest.raises(DataError, match=r"shard-00001\.tar: sample 00000015: the shard ends"):
        reader.fill(slots([(1, 7)], [0]), 0)
    column = shards.path / "shard-00000.moments.npy"
    reader.fill(slots([(0, 0)], [0]), 0)
    os.truncate(column, column.stat().st_size - 3)
    with pytest.raises(DataError, match=r"shard-00000\.moments\.npy: sample 00000007 .*truncated"):
        reader.fill(slots([(0, 7)], [1]), 0)
    reader.close()
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.tar: sample .*No such file"):
        reader.fill(slots([(1, 2)], [0]), 0)


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "missing, but the manifest lists it"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "truncated"),
    ],
)
@pytest.mark.parametrize("file", ["shard-00003.tar", "shard-00003.moments.npy",
                                  "shard-00003.features.two.npy"])  # fmt: skip
def test_what_is_missing_or_short_is_said_at_opening(
    shards: ShardSet, file: str, damage: Damage, words: str
) -> None:
    damage(shards.path / file)
    with pytest.raises(DataError, match=f"{file}: {words}"):
        ShardSet.open(shards.path, verify="sizes")
