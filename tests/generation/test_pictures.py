"""Grids and curves: what lies where, and that nothing in the metrics makes them fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastrepa.generation.pictures import TILE, running_mean, save_curves, save_grid, to_image

COLOURS = torch.tensor(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]], dtype=torch.uint8
)


def plain_images(side: int) -> torch.Tensor:
    return COLOURS.view(5, 3, 1, 1).expand(5, 3, side, side)


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


@pytest.mark.parametrize(
    ("side", "columns", "scale", "tile"),
    [(32, None, None, 128), (256, 3, None, 256), (10, 5, 3, 30)],
)
def test_grid_layout(tmp_path, side, columns, scale, tile):
    path = tmp_path / "grid.png"
    save_grid(plain_images(side), path, columns, scale)
    sheet = read(path)
    columns = columns or 3
    rows = -(-5 // columns)
    gutter = (sheet.shape[1] - columns * tile) // (columns + 1)
    assert gutter >= 1
    assert sheet.shape == (rows * (tile + gutter) + gutter, columns * (tile + gutter) + gutter, 3)
    expected = np.full_like(sheet, 255)
    for i, colour in enumerate(COLOURS.numpy()):
        top, left = (gutter + k * (tile + gutter) for k in divmod(i, columns))
        expected[top : top + tile, left : left + tile] = colour
    assert np.array_equal(sheet, expected)


def test_images_are_enlarged_by_a_whole_factor_as_far_as_a_tile_goes(tmp_path):
    for side, factor in ((28, 4), (64, 2), (65, 1), (TILE, 1), (TILE * 4, 1)):
        save_grid(torch.zeros(1, 3, side, side, dtype=torch.uint8), tmp_path / "one.png")
        black = (read(tmp_path / "one.png") == 0).all(-1)
        assert black.any(0).sum() == black.any(1).sum() == factor * side


def test_grid_orientation(tmp_path):
    """Neither transposed nor mirrored, channels in their order."""
    image = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    image[0, 0, 0, 5] = 255
    save_grid(image, tmp_path / "grid.png", scale=1)
    gutter = 2
    assert read(tmp_path / "grid.png")[gutter, gutter + 5].tolist() == [255, 0, 0]
    assert read(tmp_path / "grid.png")[gutter, gutter].tolist() == [0, 0, 0]
    save_grid(image.expand(6, 3, 4, 6), tmp_path / "grid.png", columns=2, scale=1)
    sheet = read(tmp_path / "grid.png")
    assert sheet.shape == (3 * (4 + gutter) + gutter, 2 * (6 + gutter) + gutter, 3)
    for row in range(3):
        assert sheet[gutter + row * (4 + gutter), gutter + 5].tolist() == [255, 0, 0]


def test_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(TypeError, match="uint8"):
        to_image(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match="uint8"):
        to_image(torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="nothing to show"):
        save_grid(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), tmp_path / "grid.png")


def test_running_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    for window in (1, 5, 11):
        means = running_mean(values, window)
        half = window // 2
        for i in range(50):
            reach = min(half, i)
            assert means[i] == pytest.approx(values[i - reach : i + reach + 1].mean(), abs=1e-12)
    line = np.arange(20.0)
    assert running_mean(line, 9)[:16] == pytest.approx(line[:16])  # no lag behind a slope


def metrics(count: int, **changes: float) -> list[dict[str, float]]:
    return [
        {
            "step": 10 * (i + 1),
            "loss": 1 / (i + 1),
            "velocity_loss": 1.5 / (i + 1),
            "alignment_loss": -0.01 * i,
            "images_per_s": 100.0,
            "lr": 1e-4,
            "grad_norm": 0.5,
            **changes,
        }
        for i in range(count)
    ]


def coloured(path) -> np.ndarray:
    """Return the pixels that are neither grey nor white: the curves."""
    pixels = read(path).astype(int)
    return pixels.max(-1) - pixels.min(-1) > 60


@pytest.mark.parametrize("count", [1, 3, 400])
def test_curves(tmp_path, count):
    save_curves(metrics(count), tmp_path / "curves.png")
    curve = coloured(tmp_path / "curves.png")
    assert curve.shape[1] > curve.shape[0]  # three panels in a row, two rows
    height, width = curve.shape[0] // 2, curve.shape[1] // 3
    for row in range(2):
        for column in range(3):
            panel = curve[row * height : (row + 1) * height, column * width : (column + 1) * width]
            inside = panel[height // 8 : -height // 8]  # without the coloured number above
            grey = (row, column) == (1, 2)  # the gradient norm
            assert grey or inside.sum() > 5, (row, column)


def test_curves_of_evaluations(tmp_path):
    """A third row; of each metric's panel nothing for its deviation over parts."""
    lines = metrics(30)
    save_curves(lines, tmp_path / "without.png")
    scores = {"fid": 20.0, "fd_dinov2_vitb14": 300.0, "fd_dinov2_vitb14_std": 1.0}
    save_curves([*lines, *metrics(4, **scores)], tmp_path / "with.png")
    curve, before = coloured(tmp_path / "with.png"), read(tmp_path / "without.png")
    assert curve.shape[0] == pytest.approx(before.shape[0] * 1.5, abs=2)
    width, below = curve.shape[1] // 3, curve[-curve.shape[0] // 3 + 40 :]
    drawn = [below[:, i * width : (i + 1) * width].sum() > 20 for i in range(3)]
    assert drawn == [True, True, False]


def test_curves_without_some_keys_or_without_anything(tmp_path):
    plain = [{k: v for k, v in m.items() if k != "alignment_loss"} for m in metrics(30)]
    save_curves(plain, tmp_path / "plain.png")
    assert coloured(tmp_path / "plain.png").any()
    save_curves([{**m, "alignment_loss": None} for m in plain], tmp_path / "nothing.png")
    assert np.array_equal(read(tmp_path / "plain.png"), read(tmp_path / "nothing.png"))
    save_curves([], tmp_path / "none.png")
    assert not coloured(tmp_path / "none.png").any()
    save_curves(metrics(3, loss=float("nan"), alignment_loss=None), tmp_path / "nan.png")


def test_values_that_are_not_finite_are_marked(tmp_path):
    lines = metrics(60)
    save_curves(lines, tmp_path / "good.png")
    lines[30]["loss"] = float("inf")
    save_curves(lines, tmp_path / "bad.png")

    def red(path) -> int:
        pixels = read(path).astype(int)
        return int(((pixels[..., 0] > 180) & (pixels[..., 1:].max(-1) < 60)).sum())

    assert red(tmp_path / "good.png") == 0
    assert red(tmp_path / "bad.png") > 0


def test_names_stand_over_the_rows_that_they_are_of(tmp_path):
    images = plain_images(128).repeat(2, 1, 1, 1)  # five colours, twice
    save_grid(images, tmp_path / "bare.png", columns=5)
    save_grid(images, tmp_path / "turns.png", names=["a", "bb", "c", "d", "e"] * 2)
    bare, turns = read(tmp_path / "bare.png"), read(tmp_path / "turns.png")
    strip = turns.shape[0] - bare.shape[0]  # one, over the first row
    gutter = 8
    assert np.array_equal(turns[gutter + strip :], bare[gutter:])
    assert turns.shape[1] == bare.shape[1]
    for column in range(5):
        left = gutter + column * (128 + gutter)
        dark = np.flatnonzero((turns[gutter : gutter + strip, left : left + 128] < 128).any((0, 2)))
        assert abs(dark.mean() - 64) < 3

    # Ten names in rows of four: each row has its own.
    save_grid(images, tmp_path / "own.png", names=[str(i) for i in range(10)])
    save_grid(images, tmp_path / "square.png", columns=4)
    own, square = read(tmp_path / "own.png"), read(tmp_path / "square.png")
    assert own.shape[0] - square.shape[0] == 3 * strip
    for row in range(3):
        top = gutter + row * (128 + gutter)
        assert np.array_equal(
            own[top + (row + 1) * strip : top + (row + 1) * strip + 128], square[top : top + 128]
        )
