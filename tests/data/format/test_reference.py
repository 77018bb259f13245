"""The reference's layout is read as it is: by name, with every missing or odd file said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrepa.data.datasets import open_data
from fastrepa.data.format.reference import ReferenceSet, read_moments
from fastrepa.data.format.reference_layout import moments_of
from fastrepa.data.format.store import Slots
from fastrepa.errors import DataError
from tests.sets import written
from tests.sets.written import relabel

SHAPE = (2 * written.CHANNELS, written.SIDE, written.SIDE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written.write_reference(tmp_path / "reference")


def fill(data: ReferenceSet, place: tuple[int, int]) -> Slots:
    slots = Slots([place], [0], np.zeros(1, np.int64), [None], np.zeros((1, *SHAPE), np.float32))
    data.store(image=True, moments=True, features=(), open_shards=1).fill(slots, 0)
    return slots


def test_what_a_set_says_of_itself(folder: Path) -> None:
    data = ReferenceSet.open(folder, resolution=16)
    assert (data.num_samples, data.resolution, data.classes) == (34, 16, ["0", "1", "2"])
    assert (data.moments.channels, data.moments.side, data.moments.views) == (2, 2, 1)
    assert data.features == ()
    pair = data.pair(2, 3)
    assert pair.image == folder / "images/00002/img00000023.png"
    assert pair.moments == folder / "vae-sd/00002/img-mean-std-00000023.npy"
    assert pair.label == written.label(23)
    assert moments_of("images/00002/img00000023.png") == "vae-sd/00002/img-mean-std-00000023.npy"
    assert (read_moments(pair.moments) == written.moments(23, 0)).all()
    with pytest.raises(DataError, match=r"images of 16 px, but 32 px is asked for"):
        ReferenceSet.open(folder, resolution=32)


def test_pairs_by_name_never_by_position(folder: Path) -> None:
    """Holes in the numbers, another folder's same number, other text of the same value."""
    for name in ("images/00001/img00000013.png", "vae-sd/00001/img-mean-std-00000013.npy"):
        (folder / name).unlink()
    moved = {}
    for old, new in (("00000/{}00000005", "00003/{}00000005"), ("00000/{}00000007", "00000/{}7")):
        for pattern in ("images/{}.png", "vae-sd/{}.npy"):
            prefix = "img" if "images" in pattern else "img-mean-std-"
            moved[pattern.format(old.format(prefix))] = pattern.format(new.format(prefix))
    for old, new in moved.items():
        (folder / old).rename(folder / new)

    def change(labels: list[Any]) -> None:
        labels[:] = [entry for entry in labels if "00000013" not in entry[0]]
        for entry in labels:
            entry[0] = moved.get(f"vae-sd/{entry[0]}", entry[0]).removeprefix("vae-sd/")

    relabel(folder, change)
    data = ReferenceSet.open(folder)
    assert data.shard_sizes == [9, 9, 10, 5]
    for shard, size in enumerate(data.shard_sizes):
        for sample in range(size):
            slots = fill(data, (shard, sample))
            number = int(data.pair(shard, sample).image.stem.removeprefix("img"))
            assert slots.label[0] == written.label(number)
            assert slots.moments is not None and slots.encoded is not None
            assert (slots.moments[0] == written.moments(number, 0)).all()
            assert slots.encoded[0].tobytes() == data.pair(shard, sample).image.read_bytes()


def edit(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / name)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edit("images/00001/img00000012.png", Path.unlink),
         r"1 file labelled, but missing \(images/00001/img00000012\.png\)"),
        (edit("vae-sd/00003/img-mean-std-00000031.npy", Path.unlink),
         r"1 file labelled, but missing \(vae-sd/00003/img-mean-std-00000031\.npy\)"),
        (edit("vae-sd/00002", lambda p: [f.unlink() for f in p.iterdir()] and p.rmdir()),
         r"10 files labelled, but missing \(vae-sd/00002/img-mean-std-00000020\.npy, .*, \.\.\.\)"),
        (edit("images/00000/img00000099.png", lambda p: p.write_bytes(b"x")),
         r"1 file no label in dataset\.json \(images/00000/img00000099\.png\)"),
        (lambda f: relabel(f, lambda labels: labels.pop()), r"2 files no label in dataset\.json"),
        (edit("vae-sd/00001/img-mean-std-00000011.npy", cut),
         r"latents of another size than the first \(vae-sd/00001/img-mean-std-00000011\.npy\)"),
        (edit("images/00001/img00000011.png", lambda p: p.write_bytes(b"")),
         r"1 file empty, or .*\(images/00001/img00000011\.png\)"),
        (edit("images/00001/notes.txt", lambda p: p.write_bytes(b"")),
         r"1 file not of this layout \(images/00001/notes\.txt\)"),
        (edit("images/00001/img00000012.png", lambda p: (p.unlink(), p.symlink_to("nowhere"))),
         r"1 file labelled, but missing \(images/00001/img00000012\.png\)"),
        (edit("vae-sd/dataset.json", lambda p: p.write_text('{"labels": [[1, 2]]}')),
         r"labels\[0\] is \[1, 2\], not"),
        (edit("vae-sd/dataset.json", lambda p: p.write_text('{"labels": null}')),
         r'has no list "labels"'),
        (edit("vae-sd/dataset.json", lambda p: p.write_text("{")), "not valid JSON"),
        (lambda f: relabel(f, lambda labels: labels[0].__setitem__(0, "../img-mean-std-1.npy")),
         r"labels\[0\] is "),
        (lambda f: relabel(f, lambda labels: labels[3].__setitem__(1, -1)),
         r"labels\[3\]: the label of .* is -1"),
        (lambda f: relabel(f, lambda labels: labels[3].__setitem__(1, 1.5)), r"is 1\.5"),
        (lambda f: relabel(f, lambda labels: labels.append(labels[0])), "is listed twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_at_opening(
    folder: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=words) as caught:
        open_data(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(SHAPE, np.float64), r"float64 \[4, 2, 2\]; moments are float32"),
        (np.zeros((4, 2, 3), np.float32), r"float32 \[4, 2, 3\]; moments are"),
        (np.asfortranarray(np.ones(SHAPE, np.float32)), "in Fortran order"),
        (np.array([{}], dtype=object), "object"),
    ],
)
def test_first_latents_that_are_none(folder: Path, array: np.ndarray, words: str) -> None:
    for path in folder.glob("vae-sd/*/*.npy"):
        np.save(path, array, allow_pickle=True)
    with pytest.raises(DataError, match=words):
        open_data(folder)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full(SHAPE, np.nan, np.float32), "moments that are not finite"),
        (np.zeros((2, 2, 4), np.float32), r"float32 \[2, 2, 4\]; moments are"),
        (np.zeros((16, 1, 1), np.float32), r"of shape \[16, 1, 1\], not \[4, 2, 2\]"),
        (np.zeros(SHAPE, np.int32), r"int32 \[4, 2, 2\]; moments are float32"),
    ],
)
def test_latents_of_the_right_size_alone(folder: Path, array: np.ndarray, words: str) -> None:
    """A fault that its size does not tell at opening is named, with the file, when it is read."""
    path = folder / "vae-sd/00002/img-mean-std-00000024.npy"
    np.save(path, array)
    data = ReferenceSet.open(folder)
    with pytest.raises(DataError, match=rf"img-mean-std-00000024\.npy: .*{words}"):
        fill(data, (2, 4))
    fill(data, (2, 5))


def test_latents_written_by_another_program(folder: Path) -> None:
    """Another header for the same array: padded otherwise, so of another length only by chance."""
    path = folder / "vae-sd/00002/img-mean-std-00000024.npy"
    raw = path.read_bytes()
    old = b"'fortran_order': False, 'shape'"
    assert old in raw
    path.write_bytes(raw.replace(old + b": ", b"'fortran_order':False,  'shape': "))
    slots = fill(ReferenceSet.open(folder), (2, 4))
    assert slots.moments is not None
    assert (slots.moments[0] == written.moments(24, 0)).all()


def test_folders_that_are_no_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder: neither manifest\.json .*dataset\.json"):
        open_data(tmp_path / "none")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"is no data set: neither manifest\.json"):
        open_data(tmp_path)
