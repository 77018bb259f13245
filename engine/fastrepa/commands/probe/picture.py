"""A probe as pictures: heat maps of block x step, and the features of six images as colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastrepa.commands.probe.data import DataProbe, Measured
from fastrepa.commands.probe.run import RunProbe
from fastrepa.commands.probe.similarity import NEIGHBOURS
from fastrepa.data.sheet import Strip, comparison, save_picture
from fastrepa.drawing import INK, PALE, RED, axes_title, heading, new_figure, save_figure, shortened

COLOURS = "YlGnBu"
WRITTEN = 14  # columns, above which a cell has no number


def save_heat_map(probe: RunProbe, path: Path) -> None:
    """CKNNA and CKA of each encoder, and the linear probe, as block x training step."""
    panels: list[tuple[str, np.ndarray, str, str]] = []
    chance = f"unrelated: about {NEIGHBOURS / probe.held_out:.2g}"
    for number, name in enumerate(probe.encoders):
        to = f", {shortened(name, 26)}" if len(probe.encoders) > 1 else ""
        panels.append((f"CKNNA{to}", probe.cknna[number], "{:.2f}", chance))
        panels.append((f"linear CKA{to}", probe.cka[number], "{:.2f}", "debiased; unrelated: 0"))
    if np.isfinite(probe.accuracy).any():
        encoders = ", ".join(f"{a:.0%}" for a in probe.encoder_accuracy)
        reference = f"guessing {100 * probe.chance:.3g}%, the encoder {encoders}"
        title = "linear probe, balanced accuracy, %"
        panels.append((title, 100 * probe.accuracy, "{:.0f}", reference))
    depth, count = probe.accuracy.shape
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = columns * max(3.7, 0.46 * min(count, 24) + 1.2)
    each = max(1.9, 0.3 * depth + 1.25)
    figure = new_figure(width, 0.95 + rows * each)
    top = 1 - 0.95 / figure.get_figheight()
    grid = figure.add_gridspec(
        rows, columns, left=0.55 / width, right=1 - 0.25 / width, top=top,
        bottom=0.5 / figure.get_figheight(), wspace=0.14, hspace=0.55,
    )  # fmt: skip
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(grid[divmod(place, columns)])
        _panel(axes, probe, *panel, leftmost=place % columns == 0)
    _heading(figure, probe)
    save_figure(figure, path)


def _panel(
    axes: Any,
    probe: RunProbe,
    title: str,
    values: np.ndarray,
    form: str,
    reference: str,
    *,
    leftmost: bool,
) -> None:
    depth, count = values.shape
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    high = high if high > low else low + 1e-9
    axes.set_facecolor("#eeeeee")  # where a value is nan
    axes.imshow(values, aspect="auto", cmap=COLOURS, vmin=low, vmax=high, interpolation="nearest")
    if count <= WRITTEN:
        for (block, step), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = (value - low) / (high - low) > 0.55
                axes.text(
                    step, block, form.format(value), ha="center", va="center", fontsize=7,
                    color="white" if dark else INK,
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
    axes.set_xlabel(f"training step   ({reference})", fontsize=8.5, color=PALE)
    axes_title(axes, title, pad=5)
    axes.spines[:].set_visible(False)


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
