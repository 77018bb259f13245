"""Pictures for people: grids of images, and the curves of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastrepa.runtime.files import aside

TILE = 128
"""Small images are enlarged to at most this many pixels a side."""
MOST_COLUMNS = 16  # of classes, each of which has one
# One panel each, in reading order, where the metrics have it: key, title, colour.
PANELS = (
    ("loss", "loss", "#1f4e79"),
    ("velocity_loss", "velocity loss", "#2a7f62"),
    ("alignment_loss", "alignment loss", "#b5543c"),
    ("images_per_s", "images per second", "#6b4c9a"),
    ("lr", "learning rate", "#8a6d1d"),
    ("grad_norm", "gradient norm", "#4d4d4d"),
)
EXACT = ("lr",)
"""Keys that are set, not measured: shown without a mean."""
EVALUATION = re.compile(
    r"(fid|sfid|inception_score|kid|clip_score|precision|recall|(fd|kd|precision|recall|own)_\w+)$"
)
"""Keys of `evaluation` that get a panel too: those of Inception, and of encoders' spaces."""
EVALUATION_COLOUR = "#a8326f"
_COLUMNS = 3


def to_image(image: Tensor) -> Image.Image:
    """A Pillow RGB image from uint8 [3,H,W]. Raises TypeError for anything else."""
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise TypeError(f"expected uint8 [3,H,W], got {image.dtype} {list(image.shape)}")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def save_grid(
    images: Tensor,
    path: Path,
    columns: int | None = None,
    scale: int | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Images uint8 [N,3,H,W], row by row in a PNG, on white with white gutters.

    `columns` defaults to one for each name, where few names take turns, or else to the nearest
    square. Images smaller than half of TILE are enlarged by the whole factor `scale` with a Lanczos
    filter; by default as far as fits into TILE pixels. `names`, one for each image, stand over the
    first row and every other that has others. Raises ValueError for no images.
    """
    if len(images) == 0:
        raise ValueError("images: nothing to show")
    count, _, height, width = images.shape
    columns = min(count, columns or _turns(names or ()) or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    scale = scale or max(1, TILE // max(height, width))
    width, height = width * scale, height * scale
    gutter = max(2, min(width, height) // 16)
    strips = _strips(names or (), columns, width, gutter)
    tops, y = [], gutter
    for row in range(rows):
        y += strips[row].height if row in strips else 0
        tops.append(y)
        y += height + gutter
    sheet = Image.new("RGB", (columns * (width + gutter) + gutter, y), "white")
    for row, strip in strips.items():
        sheet.paste(strip, (0, tops[row] - strip.height))
    for i, image in enumerate(images):
        tile = to_image(image)
        if scale > 1:
            tile = tile.resize((width, height), Image.Resampling.LANCZOS)
        row, column = divmod(i, columns)
        sheet.paste(tile, (gutter + column * (width + gutter), tops[row]))
    with aside(path) as partial:
        sheet.save(partial, "PNG")


def _turns(names: Sequence[str]) -> int:
    """After how many images the names come again, where that makes columns; otherwise 0."""
    turn = len(set(names))
    whole = 1 < turn <= MOST_COLUMNS and len(names) >= 2 * turn
    return turn if whole and all(n == names[i % turn] for i, n in enumerate(names)) else 0


def _strips(names: Sequence[str], columns: int, width: int, gutter: int) -> dict[int, Image.Image]:
    """A line of names for each row whose names are not those above it, by the row's number."""
    from fastrepa.data.sheet import name_strip

    lines = [list(names[i : i + columns]) for i in range(0, len(names), columns)]
    return {
        row: name_strip(line, width, gutter)
        for row, line in enumerate(lines)
        if row == 0 or line != lines[row - 1][: len(line)]
    }


def save_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training curves as a PNG: a small panel for each of PANELS that the metrics hold.

    `metrics` are a run's logged lines (`step` and any of the panels' keys); what EVALUATION matches
    gets panels after them. Every panel shows the raw values, pale, a centred running mean, and the
    mean's last value; steps whose value is not finite are marked in red on the lower edge. Without
    metrics the picture says so.
    """
    measured = dict.fromkeys(key for line in metrics for key in line if EVALUATION.match(key))
    from fastrepa.drawing import new_figure

    evaluated = [(k, k, EVALUATION_COLOUR) for k in measured if not k.endswith("_std")]
    panels = [*PANELS, *evaluated]
    series = {key: points for key, _, _ in panels if len((points := _points(metrics, key))[0])}
    shown = [panel for panel in panels if panel[0] in series]
    rows = max(1, math.ceil(len(shown) / _COLUMNS))
    columns = 2 if len(shown) == 4 else max(1, min(_COLUMNS, len(shown)))
    figure = new_figure(4.2 * columns, 2.9 * rows, dpi=110, layout="constrained")
    if not shown:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center", color="#555555")
    for i, (key, title, colour) in enumerate(shown):
        _panel(figure.add_subplot(rows, columns, i + 1), *series[key], title, colour, key in EXACT)
    with aside(path) as partial:
        figure.savefig(partial, format="png")


def _points(
    metrics: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return (steps [n], values [n]) float64 of the lines that hold the key."""
    pairs = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def running_mean(values: np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """Mean over `window` (odd) values around each [n]; at the ends over those that there are.

    At the start the window stays symmetric, where a one-sided one would bend a steep curve. At the
    end it does not, so that the last mean is one of many values, too.
    """
    total = np.concatenate(([0.0], np.cumsum(values)))
    centre = np.arange(len(values))
    reach = np.minimum(window // 2, centre)
    end = np.minimum(centre + reach + 1, len(values))
    return (total[end] - total[centre - reach]) / (end - (centre - reach))


def _panel(
    axes: Any,
    steps: np.ndarray[Any, Any],
    values: np.ndarray[Any, Any],
    title: str,
    colour: str,
    exact: bool,
) -> None:
    finite = np.isfinite(values)
    x, y = steps[finite], values[finite]
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#222222")
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color="#999999", labelcolor="#444444")
    axes.set_xlabel("step", fontsize=8, color="#444444")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter(_thousands)
    axes.locator_params(axis="x", nbins=6)
    if len(y):
        # As wide as a tenth of what there is: few points stay as they are.
        mean = running_mean(y, 1 if exact else 2 * (len(y) // 20) + 1)
        axes.plot(x, y, color=colour, alpha=0.3, linewidth=1)
        axes.plot(x, mean, color=colour, linewidth=1.8, marker="o" if len(y) < 30 else "", ms=3)
        axes.set_title(f"{mean[-1]:.4g}", loc="right", fontsize=10, color=colour)
        # The first steps may tower over the rest: they do not choose the scale.
        skip = 0 if exact else len(y) // 50
        low = min(np.percentile(y, 1), mean[skip:].min())
        high = max(np.percentile(y, 99), mean[skip:].max())
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + pad)
    if not finite.all():
        axes.plot(
            steps[~finite],
            np.full(int((~finite).sum()), 0.02),
            linestyle="",
            marker="|",
            color="#cc0000",
            transform=axes.get_xaxis_transform(),
            label="not finite",
        )
        axes.legend(loc="upper right", fontsize=7, frameon=False)


def _thousands(step: float, _: object) -> str:
    return f"{step / 1000:g}K" if abs(step) >= 1000 else f"{step:g}"
