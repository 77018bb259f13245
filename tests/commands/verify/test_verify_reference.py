"""Every kind of damage to REPA's layout is named with its file and sample, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.commands.verify.damages import _found, check, cut, image_bytes, lines
from tests.sets.trees import RESOLUTION, noise
from tests.sets.written import relabel


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """12 images of 16 px in two folders, moments [8,2,2], labels 0..2."""
    root, labels = tmp_path / "reference", []
    for number in range(12):
        below = f"{number // 8:05d}"
        for part in ("images", "vae-sd"):
            (root / part / below).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(noise(number, RESOLUTION, RESOLUTION))
        image.save(root / f"images/{below}/img{number:08d}.png")
        name = f"{below}/img-mean-std-{number:08d}.npy"
        moments = np.random.default_rng(number).uniform(0.1, 1, (8, 2, 2)).astype(np.float32)
        np.save(root / "vae-sd" / name, moments)
        labels.append([name, number % 3])
    (root / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))
    return root


IMAGE, LATENTS = "images/00000/img00000003.png", "vae-sd/00000/img-mean-std-00000003.npy"
LISTED, NAME = "vae-sd/dataset.json", "00000/img-mean-std-00000003.npy"


def save(array: np.ndarray) -> Callable[[Path], None]:
    return lambda root: np.save(root / LATENTS, array)


def moments_with(place: tuple[int, ...], value: float) -> np.ndarray:
    array = np.full((8, 2, 2), 0.5, dtype=np.float32)
    array[place] = value
    return array


REFERENCE_DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no image": (lambda r: (r / IMAGE).unlink(), [f"{LATENTS}: has no image of its name"]),
    "no latents": (
        lambda r: (r / LATENTS).unlink(),
        [f"{IMAGE}: has no latents of its name",
         f"{LISTED}: sample {NAME}: labelled, but the file is missing"],
    ),
    "latents of another folder": (
        lambda r: (r / LATENTS).rename(r / LATENTS.replace("/00000/", "/00001/")),
        [f"{IMAGE}: has no latents of its name",
         f"{LATENTS.replace('/00000/', '/00001/')}: has no image of its name",
         f"{LISTED}: sample {NAME}: labelled, but the file is missing",
         f"{LATENTS.replace('/00000/', '/00001/')}: has no label in dataset.json"],
    ),
    "an undecodable image": (
        lambda r: (r / IMAGE).write_bytes(image_bytes()[:-40]), [f"{IMAGE}: cannot be decoded ("],
    ),
    "an empty image": (lambda r: (r / IMAGE).write_bytes(b""), [f"{IMAGE}: cannot be decoded ("]),
    "another size": (
        lambda r: (r / IMAGE).write_bytes(image_bytes(24)), [f"{IMAGE}: 24x24 px, not 16x16"],
    ),
    "no npy": (lambda r: (r / LATENTS).write_bytes(b"x"), [f"{LATENTS}: not a readable .npy ("]),
    "a truncated npy": (cut(LATENTS, 4), [f"{LATENTS}: not a readable .npy ("]),
    "pickled": (
        lambda r: np.save(r / LATENTS, np.array([{}], dtype=object), allow_pickle=True),
        [f"{LATENTS}: not a readable .npy ("],
    ),
    "shape": (
        save(np.ones((4, 2, 2), np.float32)), [f"{LATENTS}: of shape [4, 2, 2], not [8, 2, 2]"],
    ),
    "dtype": (save(np.ones((8, 2, 2))), [f"{LATENTS}: of dtype float64, not float32"]),
    "NaN": (save(moments_with((0, 1, 1), np.nan)), [f"{LATENTS}: moments that are not finite"]),
    "std": (save(moments_with((7, 1, 1), -0.1)), [f"{LATENTS}: a negative standard deviation"]),
    "a label too few": (
        lambda r: relabel(r, lambda e: e.pop(3)), [f"{LATENTS}: has no label in dataset.json"],
    ),
    "a label twice": (
        lambda r: relabel(r, lambda e: e.append(e[3])),
        [f"{LISTED}: sample {NAME}: labelled 2 times"],
    ),
    "a negative label": (
        lambda r: relabel(r, lambda e: e[3].__setitem__(1, -1)),
        [f"{LISTED}: sample {NAME}: its label is -1"],
    ),
    "a label in words": (
        lambda r: relabel(r, lambda e: e[3].__setitem__(1, "cat")),
        [f"{LISTED}: sample {NAME}: its label is 'cat'"],
    ),
    "no pair": (
        lambda r: relabel(r, lambda e: e.__setitem__(3, 7)),
        [f"{LISTED}: labels[3] is not [file, label]", f"{LATENTS}: has no label"],
    ),
    "no labels": (lambda r: (r / LISTED).write_text("[]"), [f"{LISTED}: has no list"]),
    "no JSON": (lambda r: (r / LISTED).write_text("{"), [f"{LISTED}: not valid JSON"]),
    "no dataset.json": (lambda r: (r / LISTED).unlink(), [f"{LISTED}: missing"]),
    "a stranger": (
        lambda r: (r / "images/00000/img1 (copy).png").write_bytes(b""),
        ["images/00000/img1 (copy).png: its name is not of the reference's layout"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCE_DAMAGES)
def test_damage_to_the_reference_layout_is_named(reference: Path, name: str) -> None:
    do, wanted = REFERENCE_DAMAGES[name]
    do(reference)
    _found(wanted, lines(reference))


def test_several_damages_to_the_reference_layout(reference: Path) -> None:
    for name in ("no pair", "NaN", "another size"):
        REFERENCE_DAMAGES[name][0](reference)
    _found(
        [line for n in ("no pair", "NaN", "another size") for line in REFERENCE_DAMAGES[n][1]],
        lines(reference),
    )


def test_a_sound_reference_layout(reference: Path) -> None:
    (reference / "images/notes.txt").write_text("mine")
    (reference / "images/dataset.json").write_text("{}")  # as REPA's dataset_tools.py leaves it
    report = check(reference)
    assert report.ok
    assert report.layout == "reference"
    assert (report.num_images, report.columns, report.num_files) == (12, {"moments": 12}, 25)
    assert report.notes == ["images/notes.txt: unknown; not of the reference's layout"]
    assert check(reference, quick=True).ok


def test_the_quickstart_is_sound() -> None:
    path = Path(__file__).parents[3] / "configs/quickstart/emoji/train"
    report = check(path)
    assert report.ok, report.problems
    assert report.num_images == 1783
