"""A probe as pictures: heat maps of block x step, and the features of six images as colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastrepa.commands.probe.data import DataProbe, Measured
from fastrepa.commands.probe.report import run_record
from fastrepa.commands.probe.run import RunProbe
from fastrepa.data.sheet import Strip, comparison, save_picture
from fastrepa.drawing import INK, PALE, RED, axes_title, heading, new_figure, save_figure
from fastrepa.pages.heat import COLOURS, HIGHEST, LOWEST, HeatMap, heat_colours, heat_maps

WRITTEN = 14  # columns, above which a cell has no number


def save_heat_map(probe: RunProbe, path: Path) -> None:
    """CKNNA and CKA of each encoder, and the linear probe, as block x training step, on one scale
    of colours: from what unrelated features reach, or guessing, to the encoder itself.
    """
    maps = heat_maps(run_record(probe))
    depth, count = probe.accuracy.shape
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    width = columns * max(3.7, 0.46 * min(count, 24) + 1.2)
    each = max(1.9, 0.3 * depth + 1.25)
    height = 1.15 + rows * each
    figure = new_figure(width, height)
    grid = figure.add_gridspec(
        rows, columns, left=0.55 / width, right=1 - 0.25 / width, top=1 - 1.15 / height,
        bottom=0.5 / height, wspace=0.14, hspace=0.55,
    )  # fmt: skip
    for place, heat in enumerate(maps):
        axes = figure.add_subplot(grid[divmod(place, columns)])
        _panel(axes, probe, heat, leftmost=place % columns == 0)
    _heading(figure, probe)
    _scale(figure)
    save_figure(figure, path)


def _panel(axes: Any, probe: RunProbe, heat: HeatMap, *, leftmost: bool) -> None:
    depth, count = heat.values.shape
    axes.set_facecolor("#eeeeee")  # where a value is nan
    shares = heat.shares
    axes.imshow(shares, aspect="auto", cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    if count <= WRITTEN:
        inks = heat_colours(shares)
        for (block, step), value in np.ndenumerate(heat.values):
            if np.isfinite(value):
                axes.text(
                    step, block, heat.form.format(value), ha="center", va="center", fontsize=7,
                    color=inks[block][step][1],
                )  # fmt: skip
    if probe.block is not None:
        axes.axhline(probe.block - 1.5, color=RED, linewidth=1)
        axes.axhline(probe.block - 0.5, color=RED, linewidth=1)
    every = max(1, -(-count // 10))
    shown = [i for i in range(count) if i % every == 0 or i == count - 1]
    axes.set_xticks(shown, [f"{probe.steps[i]:,}" for i in shown], fontsize=7)
    axes.tick_params(axis="x", length=2, color=PALE, labelcolor=PALE, labelrotation=30)
    axes.set_yticks(range(depth), [str(i + 1) for i in range(depth)], fontsize=7.5)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    if probe.block is not None:
        axes.get_yticklabels()[probe.block - 1].set_color(RED)
        axes.get_yticklabels()[probe.block - 1].set_fontweight("bold")
    if leftmost:
        axes.set_ylabel("block", fontsize=8.5, color=PALE)
    axes.set_xlabel(f"training step   ({heat.reference})", fontsize=7.5, color=PALE)
    axes_title(axes, heat.title, pad=5)
    axes.spines[:].set_visible(False)


def _scale(figure: Any) -> None:
    """Draw the scale of all panels below the heading: a bar between its two ends in words."""
    width, height = figure.get_size_inches()
    y = 1 - 0.73 / height
    text = {"fontsize": 8.5, "color": PALE, "va": "center"}
    figure.text(0.015, y, LOWEST, **text)
    left = 0.015 + 1.5 / width
    axes = figure.add_axes((left, y - 0.06 / height, 1.6 / width, 0.12 / height))
    axes.imshow(np.linspace(0, 1, 64)[None], aspect="auto", cmap=COLOURS, vmin=0, vmax=1)
    axes.set_axis_off()
    figure.text(left + 1.7 / width, y, HIGHEST, **text)


def _heading(figure: Any, probe: RunProbe) -> None:
    aligned = f"; red: block {probe.block}, the aligned one" if probe.block else ""
    heading(
        figure,
        f"{probe.run.resolve().name}: what the blocks of {probe.title} know",
        f"against {', '.join(probe.encoders)}; {probe.held_out:,} images at t = {probe.time:g}, "
        f"averaged weights{aligned}",
    )


def save_features(probe: DataProbe, path: Path) -> None:
    """The images, and below them every encoder's features and its controls' as colours."""
    sample, chosen = probe.sample, probe.pictured
    images = [sample.images[int(i)].permute(1, 2, 0).numpy() for i in chosen]
    strips = [Strip(images, "image", f"{sample.resolution} px", smooth=True)]
    for encoder in probe.encoders:
        strips.append(_strip(encoder.features, encoder.features.name, encoder.verdict))
        strips.append(_strip(encoder.random, "  with random weights", ""))
    seen = set()
    for encoder in probe.encoders:
        if encoder.pixels.grid not in seen:
            seen.add(encoder.pixels.grid)
            strips.append(_strip(encoder.pixels, encoder.pixels.name, ""))
    captions = []
    for i in chosen:
        labels = sample.labels
        captions.append(("" if labels is None else sample.classes[labels[i]],
                         Path(sample.names[int(i)]).name))  # fmt: skip
    title = f"{probe.data.resolve().name}: principal components 1-3 of the features"
    save_picture(comparison(strips, captions, title), path)


def _strip(measured: Measured, name: str, remark: str) -> Strip:
    size = f"{measured.grid}x{measured.grid} tokens of {measured.width}"
    lines = [size, f"LDS {measured.lds:.2f}", *([remark] if remark else [])]
    return Strip(list(measured.colours), name, "\n".join(lines))
