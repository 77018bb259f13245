"""The plan as stacked bars: memory per GPU, and the step, across the numbers of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrepa.commands.plan.plan import STEP_PARTS, CapacityPlan, Estimate, generator_shares
from fastrepa.drawing import (
    AXIS,
    GRID,
    INK,
    PALE,
    RED,
    axes_title,
    colour_legend,
    heading,
    new_figure,
    palette,
    save_figure,
)
from fastrepa.errors import writing
from fastrepa.training.memory.sharding import PARTS

# One colour per part, kin beside kin: weights and what belongs to them, networks, the rest.
MEMORY_COLOURS = dict(
    zip(PARTS, palette("navy blue sky green mint orange purple lilac grey silver"), strict=True)
)
STEP_COLOURS = dict(
    zip(STEP_PARTS, palette("orange sand purple lilac green mint grey red"), strict=True)
)
CLIP = 1.5  # bars that tower over the GPU's memory are cut off at this many times of it


def save_plan_picture(plan: CapacityPlan, path: Path) -> None:
    """Write the PNG. ConfigError where it cannot be written."""
    pairs = [(row.configured, row.cheapest) for row in plan.rows]
    figure = new_figure(max(10.0, 3 + 2.4 * len(pairs)), 6.0)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.8, bottom=0.23, wspace=0.12)
    memory, time = figure.subplots(1, 2)

    capacity = plan.gpu.memory / 1e9
    highest = max(e.total for pair in pairs for e in pair if e) / 1e9
    top = min(max(highest, capacity), CLIP * capacity)
    _bars(memory, pairs, _memory_parts, MEMORY_COLOURS, lambda e: f"{e.total / 1e9:.1f}", top)
    memory.axhline(capacity, color=RED, linewidth=1.2, linestyle=(0, (5, 3)), zorder=3)
    memory.annotate(
        f"{capacity:.0f} GB", (1, capacity), xycoords=("axes fraction", "data"), xytext=(-2, 3),
        textcoords="offset points", ha="right", fontsize=8, color=RED,
    )  # fmt: skip
    longest = max(sum(_step_parts(e).values()) for pair in pairs for e in pair if e)
    _bars(
        time, pairs, _step_parts, STEP_COLOURS, lambda e: _milliseconds(e.seconds),
        longest,
    )  # fmt: skip
    for axes, title in (
        (memory, "highest memory per GPU, GB"),
        (time, "GPU time per image, ms (above the bars: one step)"),
    ):
        axes_title(axes, title)
        axes.tick_params(axis="y", labelsize=8, length=0, labelcolor=PALE)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(AXIS)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        names = [n for n in dict.fromkeys((*PARTS, *STEP_PARTS)) if n in handles]
        colour_legend(
            axes, [handles[name] for name in names], names, loc="upper center",
            bbox_to_anchor=(0.5, -0.175), ncols=5 if len(pairs) > 3 else 4, fontsize=8,
        )  # fmt: skip
    _heading(figure, plan)
    with writing(f"--png: {path}"):
        save_figure(figure, path)


def _heading(figure: Any, plan: CapacityPlan) -> None:
    c, w = plan.config, plan.workload
    name = c.model.name or f"SiT {c.model.width} wide, {c.model.depth} deep"
    heading(
        figure,
        f"{name}, {w.parameters.numel / 1e6:,.0f} M parameters, batch "
        f"{c.training.global_batch:,}, on {plan.gpu.title}",
        "left of each pair: as configured; right: advised "
        "(Z: ZeRO stage, forwards x micro-batch, recompute: every so manieth block)\n"
        f"estimates from datasheet speeds, the generator at {generator_shares(plan)} of peak; "
        "nothing measured on these GPUs",
        left=0.05,
    )


def _memory_parts(e: Estimate) -> dict[str, float]:
    return {part: size / 1e9 for part, size in e.memory.items()}


def _step_parts(e: Estimate) -> dict[str, float]:
    images = e.sharding.micro * e.sharding.forwards  # per GPU
    return {part: 1e3 * seconds / images for part, seconds in e.step.items()}


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 1}f} ms"


def _bars(
    axes: Any,
    pairs: Sequence[tuple[Estimate, Estimate | None]],
    parts_of: Callable[[Estimate], dict[str, float]],
    colours: dict[str, str],
    total: Callable[[Estimate], str],
    top: float,
) -> None:
    """Pairs of stacked bars up to `top`; a part that is nowhere visible gets no legend."""
    width, shown = 0.38, set()
    for i, pair in enumerate(pairs):
        for k, estimate in enumerate(pair):
            x = i + (k - 0.5) * (width + 0.05)
            if estimate is None:
                _write(axes, x, 0, "nothing\nfits", 4, RED)
                continue
            bottom = 0.0
            for part, value in parts_of(estimate).items():
                value = min(value, top - bottom)
                if value > 0.003 * top:
                    axes.bar(
                        x, value, width, bottom=bottom, color=colours[part], edgecolor="white",
                        linewidth=0.5, label=None if part in shown else part,
                    )  # fmt: skip
                    shown.add(part)
                bottom += value
            cut = sum(parts_of(estimate).values()) > 1.001 * top
            _write(axes, x, bottom, total(estimate) + (" ↑" if cut else ""), 3, RED if cut else INK)
            s = estimate.sharding
            how = f"\nrecompute {s.recompute}" if s.recompute else ""
            _write(axes, x, 0, f"Z{s.stage}\n{s.forwards}x{s.micro}{how}", -4, PALE)
        count = pair[0].sharding.world
        axes.annotate(
            f"{count:,} GPU{'s' if count > 1 else ''}", (i, 0), xytext=(0, -36), va="top",
            textcoords="offset points", ha="center", fontsize=9, fontweight="bold", color=INK,
            annotation_clip=False,
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(pairs) - 0.4)
    axes.set_ylim(0, 1.1 * top)


def _write(axes: Any, x: float, y: float, text: str, points: int, colour: str) -> None:
    axes.annotate(
        text, (x, y), xytext=(0, points), textcoords="offset points", ha="center",
        va="bottom" if points > 0 else "top", fontsize=7.5, color=colour, annotation_clip=False,
    )  # fmt: skip
