"""The pictures of `data show` are what the set holds, where it says, chosen evenly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from fastrepa.cli import app
from fastrepa.commands.show.show import MARK, choose, show
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.gallery import Gallery
from fastrepa.data.sheet import (
    LARGEST,
    Strip,
    comparison,
    contact_sheet,
    false_colours,
    principal_components,
    tile,
)
from fastrepa.errors import DataError
from tests.sets import written
from tests.sets.trees import flip_byte, noise
from tests.sets.written import write_reference, write_set


def pixels(picture: Image.Image | Path) -> np.ndarray:
    image = picture if isinstance(picture, Image.Image) else Image.open(picture)
    return np.asarray(image.convert("RGB"))


def places(sheet: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """Return (row, column) of every place in `sheet` where `part` lies, pixel for pixel."""
    height, width = part.shape[:2]
    found = np.argwhere((sheet[: -height + 1, : -width + 1] == part[0, 0]).all(-1))
    return [
        (int(y), int(x))
        for y, x in found
        if np.array_equal(sheet[y : y + height, x : x + width], part)
    ]


# Pictures ----------------------------------------------------------------------------------------


def test_every_image_is_on_the_sheet_unchanged_and_in_order() -> None:
    images = [noise(n, 96, 96) for n in range(5)]
    sheet = pixels(contact_sheet(images, [("name", "key")] * 5, "title", columns=3))
    corners = []
    for image in images:
        (corner,) = places(sheet, image)
        corners.append(corner)
    assert corners == sorted(corners)
    assert [len({y for y, _ in corners[:3]}), len({y for y, _ in corners[3:]})] == [1, 1]
    assert corners[0][1] == corners[3][1]


@pytest.mark.parametrize(
    ("side", "shown"), [(16, 128), (32, 128), (96, 96), (256, 256), (512, LARGEST)]
)
def test_tiles_have_a_readable_size(side: int, shown: int) -> None:
    image = noise(0, side, side)
    assert tile(image).size == (shown, shown)
    wanted = Image.fromarray(image).resize((shown, shown), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(tile(image)), pixels(wanted))


def test_captions_are_drawn_and_stay_within_their_tile() -> None:
    white = np.full((96, 96, 3), 255, dtype=np.uint8)
    short, long = ("ant", "00000001"), ("a very long name of a class " * 5, "00000002")
    without = pixels(contact_sheet([white] * 2, [("", "")] * 2, "", columns=2))
    assert (without == 255).all()
    for captions, side in (([short, ("", "")], 0), ([("", ""), long], 1), ([long, ("", "")], 0)):
        drawn = pixels(contact_sheet([white] * 2, captions, "", columns=2))
        ink = np.flatnonzero((drawn != 255).any((0, 2)))
        left = 16 + side * (96 + 10)
        assert left <= ink.min()
        assert ink.max() < left + 96


def test_no_images() -> None:
    with pytest.raises(ValueError, match="nothing to show"):
        contact_sheet([], [], "title")


def test_comparison_keeps_every_value_a_square() -> None:
    maps = [noise(n, 4, 4) for n in range(2)]
    strips = [Strip([noise(9, 64, 64)] * 2, "image", smooth=True), Strip(maps, "maps", "remark")]
    sheet = pixels(comparison(strips, [("a", "1"), ("b", "2")], "title"))
    corners = [places(sheet, np.kron(m, np.ones((32, 32, 1), np.uint8)))[0] for m in maps]
    assert corners[0][0] == corners[1][0]
    assert corners[0][1] < corners[1][1]


def test_false_colours_are_robust_and_per_channel() -> None:
    values = np.linspace(0, 1, 1000).reshape(10, 10, 10, 1) * (1.0, 50.0, 1.0) + (0.0, 7.0, 0.0)
    values[..., 2] = 3.0
    values[0, 0, 0, 0] = -1e6  # an outlier must not turn the rest into one colour
    colours = false_colours(values)
    assert colours.dtype == np.uint8
    assert colours.shape == (10, 10, 10, 3)
    assert (colours[..., 2] == 128).all()  # constant: grey
    for channel in range(2):
        x = values[..., channel]
        low, high = np.percentile(x, [2, 98])
        wanted = np.rint(255 * ((x - low) / (high - low)).clip(0, 1))
        assert np.array_equal(colours[..., channel], wanted)
        assert np.unique(colours[..., channel]).size > 200
    one = false_colours(values[..., :1])
    assert (one[..., 1:] == 128).all()
    assert np.array_equal(one[..., 0], colours[..., 0])


def test_principal_components_equal_an_independent_decomposition() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 12)) * np.geomspace(10, 0.1, 12) + draw.normal(size=12)
    parts = principal_components(x.astype(np.float32))
    assert parts.dtype == np.float64
    x = x.astype(np.float32).astype(np.float64)
    covariance = np.cov(x.T)
    values, vectors = np.linalg.eigh(covariance)  # ascending
    for number in range(3):
        axis = vectors[:, -1 - number]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        assert np.allclose(parts[:, number], (x - x.mean(0)) @ axis, rtol=1e-9, atol=1e-9)
        assert np.isclose(parts[:, number].var(ddof=1), values[-1 - number])


def test_signs_of_components_do_not_depend_on_the_order_of_tokens() -> None:
    x = np.random.default_rng(1).normal(size=(50, 6))
    order = np.random.default_rng(2).permutation(50)
    assert np.allclose(principal_components(x)[order], principal_components(x[order]))
    assert principal_components(x[:2], 3).shape == (2, 2)
    assert np.isfinite(principal_components(np.ones((5, 4)))).all()


# The choice --------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    num=st.integers(1, 80),
    seed=st.integers(0, 2**64 - 1),
)
def test_choice_is_even_and_seeded(sizes: list[int], num: int, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    chosen = choose(labels, num, seed)
    assert len(chosen) == min(num, len(labels))
    assert len(set(chosen.tolist())) == len(chosen)
    counts = np.bincount(labels[chosen], minlength=len(sizes))
    # A class with images left has at most one less than any other.
    left = counts < np.array(sizes)
    assert not left.any() or counts.max() - counts[left].min() <= 1
    assert np.array_equal(chosen, choose(labels, num, seed))
    assert np.array_equal(chosen[: num // 2], choose(labels, num // 2, seed))


def test_choice_changes_with_the_seed_and_keeps_to_the_classes_allowed() -> None:
    labels = np.repeat(np.arange(10), 100)
    first, second = choose(labels, 20, 0), choose(labels, 20, 1)
    assert set(first.tolist()) != set(second.tolist())
    assert set(labels[choose(labels, 20, 0, [3, 7])].tolist()) == {3, 7}


# Sets --------------------------------------------------------------------------------------------


@pytest.fixture
def columns_set(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path / "data", latents=2, encoders={"one": 1, "two": 2})


def test_gallery_gives_each_sample_its_own(columns_set: ShardSet, tmp_path: Path) -> None:
    reference = Gallery(write_reference(tmp_path / "reference"))
    gallery = Gallery(columns_set.path)
    assert len(gallery.labels) == len(reference.labels) == written.SAMPLES
    for number in (0, 7, 8, 21, 33):
        for of in (gallery, reference):
            assert np.array_equal(of.image(number), written.image(number))
            assert of.labels[number] == written.label(number)
            mean = written.moments(number, 0)[: written.CHANNELS]
            assert np.array_equal(of.latent_mean(number), mean.astype(np.float32))
        assert gallery.key(number) == f"{number:08d}"
        assert reference.key(number) == f"{number // 10:05d}/img{number:08d}"
        wanted = written.tokens(number, 0) * written.scale(number, 0).astype(np.float32)[:, None]
        for encoder in gallery.encoders:
            assert np.array_equal(gallery.tokens(encoder, number), wanted)


def test_pictures_hold_what_was_chosen(columns_set: ShardSet, tmp_path: Path) -> None:
    report = show(columns_set.path, tmp_path / "x.png", num=10, seed=3, features=4)
    assert report.pictures == [tmp_path / "x.png", tmp_path / "x_columns.png"]
    labels = np.array([written.label(n) for n in range(written.SAMPLES)])
    chosen, few = choose(labels, 10, 3), choose(labels, 4, 3)
    sheet, columns = pixels(report.pictures[0]), pixels(report.pictures[1])
    corners = {n: places(sheet, pixels(tile(written.image(n)))) for n in range(written.SAMPLES)}
    assert {n for n, found in corners.items() if found} == set(chosen.tolist())
    by_class = sorted(chosen, key=lambda n: corners[n][0])
    assert sorted(labels[by_class].tolist()) == labels[by_class].tolist()
    # Beside each other: image, latents and both encoders' tokens, in one column for each image.
    means = np.stack([written.moments(n, 0)[: written.CHANNELS] for n in few]).astype(np.float64)
    latents = false_colours(means.transpose(0, 2, 3, 1))
    tokens = np.stack([
        written.tokens(n, 0) * written.scale(n, 0).astype(np.float32)[:, None] for n in few
    ])  # fmt: skip
    parts = principal_components(tokens.reshape(-1, written.WIDTH))
    patches = false_colours(parts.reshape(4, written.GRID, written.GRID, -1))
    for place, number in enumerate(few):
        ((top, left),) = places(columns, pixels(tile(written.image(number))))
        below = [
            columns[top + row * 138 : top + row * 138 + 128, left : left + 128] for row in (1, 2, 3)
        ]
        big = np.ones((64, 64, 1), np.uint8)
        assert np.array_equal(below[0], np.kron(latents[place], big))
        assert np.array_equal(below[1], np.kron(patches[place], big))
        assert np.array_equal(below[2], below[1])


def test_summary_says_what_the_set_is(columns_set: ShardSet, tmp_path: Path) -> None:
    summary = dict(show(columns_set.path, tmp_path / "x.png").summary)
    assert summary["images"] == "34 in 5 shards"
    assert summary["classes"] == "3, of 11 to 12 images"
    assert summary["resolution"] == "16 px"
    assert summary["format"].startswith("png")
    assert "2 views" in summary["moments"]
    for word in ("int8 [4, 5]", "fp32", "min cosine 0.99900", "1 view"):
        assert word in summary["features.one"]


def test_both_layouts_and_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "plain")
    write_reference(tmp_path / "reference")
    assert show("plain").pictures == [Path("plain_show.png")]
    assert show("reference", num=5).pictures == [
        Path("reference_show.png"), Path("reference_show_columns.png")
    ]  # fmt: skip
    assert show("reference", tmp_path, features=0).pictures == [tmp_path / "reference_show.png"]


def test_nothing_but_its_own_pictures_is_overwritten(columns_set: ShardSet, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    assert show(columns_set.path, out).pictures
    before = out.read_bytes()
    assert show(columns_set.path, out, seed=5).pictures  # its own
    assert out.read_bytes() != before
    with Image.open(out) as image:
        assert image.info["Software"] == MARK
    for path in (out, tmp_path / "x_columns.png"):
        for content in (b"my notes", None):
            if content is None:
                Image.new("RGB", (4, 4)).save(path)
            else:
                path.write_bytes(content)
            mine = path.read_bytes()
            with pytest.raises(DataError, match=f"{path.name}: exists and is no picture of"):
                show(columns_set.path, out)
            assert path.read_bytes() == mine
            path.unlink()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"classes": ["c9"]}, r"'c9' is no class .*; a class is a number from 0 to 2, or one of"),
        ({"classes": ["3"]}, "'3' is no class;"),
        ({"num": 0}, "num must be at least 1"),
        ({"out": "x.jpg"}, "name it .png"),
        ({"out": "nowhere/x.png"}, "no such folder"),
    ],
)
def test_bad_requests(tmp_path: Path, options: dict, reason: str) -> None:
    path = write_set(tmp_path / "data").path
    with pytest.raises(DataError, match=reason):
        show(path, **{"out": tmp_path / "x.png", **options})


def test_damage_is_an_error_that_names_the_sample(columns_set: ShardSet, tmp_path: Path) -> None:
    path = columns_set.path / "shard-00000.features.one.npy"
    flip_byte(path, path.stat().st_size - 10)
    with pytest.raises(DataError, match=r"features\.one\.npy: sample 00000007 .*damaged"):
        show(columns_set.path, tmp_path / "x.png", num=34, features=34)


def test_command_line(columns_set: ShardSet, tmp_path: Path) -> None:
    arguments = ["data", "show", str(columns_set.path), "--out", str(tmp_path), "-n", "6",
                 "--classes", "c1, 2", "--features", "2"]  # fmt: skip
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert "34 in 5 shards" in run.stdout
    assert "data_show.png" in run.stdout
    sheet = pixels(tmp_path / "data_show.png")
    shown = [n for n in range(34) if places(sheet, pixels(tile(written.image(n))))]
    assert {written.label(n) for n in shown} == {1, 2}
    assert len(shown) == 6
