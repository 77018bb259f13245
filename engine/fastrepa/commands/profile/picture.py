"""A profile as pictures: the step as stacked bars, and the roofline with the operations on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrepa.commands.profile.profile import (
    OperationGroup,
    Profile,
    ProfileReport,
    by_operation,
    by_part,
)
from fastrepa.drawing import (
    AXIS,
    BLUE,
    GRID,
    INK,
    PALE,
    axes_title,
    colour_legend,
    heading,
    new_figure,
    palette,
    readable_on,
    save_figure,
    shortened,
)
from fastrepa.runtime.regions import NAMES

REGION_COLOURS = dict(
    zip(NAMES, palette("red purple lilac blue navy grey green mint silver"), strict=True)
)
PART_COLOURS = palette("navy blue sky green orange sand silver")
WRITTEN = 0.045  # of the longest bar: narrower segments have no number
NAMED = 9  # operations in the roofline


def save_step(report: ProfileReport, path: Path) -> None:
    """The step by region, and the generator by part, a bar for each set of kernels."""
    profiles = report.profiles
    count = len(profiles)
    bar = 0.42 * count  # inches of bars in an axes
    figure = new_figure(11.0, 2.75 + 2 * bar)
    height = figure.get_figheight()
    _heading(figure, report, "where a training step goes")
    bottoms = (height - 1.15 - bar, height - 2.25 - 2 * bar)
    regions, parts = (
        figure.add_axes((0.09, bottom / height, 0.88, bar / height)) for bottom in bottoms
    )
    names = [n for n in NAMES if any(p.regions[n] > 0.002 * p.seconds for p in profiles)]
    _bars(
        regions, profiles,
        [[(n.replace("_", " "), p.regions[n], REGION_COLOURS[n]) for n in names] for p in profiles],
        "one step, ms, undisturbed",
    )  # fmt: skip
    tables = [{row.name: row.seconds for row in by_part(p)} for p in profiles]
    ordered = list(dict.fromkeys(name.rpartition(", ")[0] for table in tables for name in table))
    colours = dict(zip(ordered, PART_COLOURS, strict=False))
    _bars(
        parts, profiles,
        [
            [
                (part, sum(s for n, s in table.items() if n.rpartition(", ")[0] == part),
                 colours.get(part, PART_COLOURS[-1]))
                for part in ordered
            ]
            for table in tables
        ],
        "the generator's operations by part, forward and backward, ms, under the profiler",
    )  # fmt: skip
    save_figure(figure, path)


def _bars(
    axes: Any, profiles: list[Profile], bars: list[list[tuple[str, float, str]]], title: str
) -> None:
    """Horizontal stacked bars of (name, seconds, colour), the first on top."""
    longest = max(sum(seconds for _, seconds, _ in bar) for bar in bars)
    shown: dict[str, Any] = {}
    for number, (profile, bar) in enumerate(zip(profiles, bars, strict=True)):
        left = 0.0
        for name, seconds, colour in bar:
            drawn = axes.barh(
                -number, seconds, 0.66, left=left, color=colour, edgecolor="white", linewidth=0.6
            )
            shown.setdefault(name, drawn)
            if seconds > WRITTEN * longest:
                axes.text(
                    left + seconds / 2, -number, _ms(seconds), ha="center", va="center", fontsize=8,
                    color=readable_on(colour),
                )  # fmt: skip
            left += seconds
        axes.text(
            left + 0.006 * longest, -number, _ms(left), va="center", fontsize=9, fontweight="bold",
            color=INK,
        )  # fmt: skip
        axes.text(
            -0.008 * longest, -number, profile.kernels, ha="right", va="center", fontsize=9.5,
            color=INK,
        )  # fmt: skip
    axes_title(axes, title, pad=6)
    axes.set_xlim(0, 1.07 * longest)
    axes.set_ylim(-len(bars) + 0.5, 0.5)
    axes.set_axis_off()
    colour_legend(
        axes, list(shown.values()), list(shown), loc="upper left", bbox_to_anchor=(-0.008, 0.02),
        ncols=9, fontsize=8.5,
    )  # fmt: skip


def save_roofline(report: ProfileReport, path: Path) -> None:
    """Draw, left, achieved FLOP/s over FLOPs per byte, under the measured ceilings; right, the
    longest operations, their time and what of it the roofline asks for.
    """
    figure = new_figure(13.0, 6.2)
    _heading(figure, report, f"{report.profiles[0].kernels} kernels against the roofline")
    height = 0.68
    left = figure.add_axes((0.065, 0.12, 0.40, height))
    right = figure.add_axes((0.705, 0.12, 0.25, height))
    profile = report.profiles[0]
    rows = by_operation(profile)
    _roofline(left, report, [r for r in rows if r.cost.flops and r.cost.bytes and r.seconds])
    _floors(right, report, rows[:14], profile.trace.seconds)
    save_figure(figure, path)


def _roofline(axes: Any, report: ProfileReport, rows: list[OperationGroup]) -> None:
    c = report.ceilings
    ridge = c.flops_per_second / c.bytes_per_second
    intensities = [r.cost.flops / r.cost.bytes for r in rows] or [ridge]
    low = min(*intensities, ridge) / 3
    high = max(*intensities, ridge) * 6
    axes.plot(
        (low, ridge, high), (low * c.bytes_per_second, c.flops_per_second, c.flops_per_second),
        color=INK, linewidth=1.6, zorder=2,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    speeds = [r.flops_per_second for r in rows] or [c.flops_per_second]
    bottom, top = min(speeds) / 4, max(*speeds, c.flops_per_second) * 2.2
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, top)
    longest = max((r.seconds for r in rows), default=1.0)
    taken: list[tuple[float, float]] = []
    for number, row in enumerate(rows):
        x, y = row.cost.flops / row.cost.bytes, row.flops_per_second
        axes.scatter(
            x, y, s=24 + 320 * row.seconds / longest, color=BLUE, alpha=0.6, edgecolor="white",
            linewidth=0.8, zorder=3,
        )  # fmt: skip
        if number < NAMED:
            place = _free_place(axes, x, y, taken, top / bottom, high / low)
            axes.annotate(
                f"{number + 1}", (x, y), xytext=place, textcoords="offset points", fontsize=9,
                fontweight="bold", color=INK, ha="center", va="center", zorder=4,
                arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.7, "shrinkA": 5,
                            "shrinkB": 0} if place != (0, 0) else None,
            )  # fmt: skip
    legend = "\n".join(f"{n + 1}  {_short(row.name)}" for n, row in enumerate(rows[:NAMED]))
    axes.text(
        0.985, 0.03, legend, transform=axes.transAxes, ha="right", va="bottom", fontsize=8,
        color=INK, linespacing=1.45, multialignment="left",
        bbox={"facecolor": "white", "edgecolor": "#dddddd", "boxstyle": "round,pad=0.5"}, zorder=5,
    )  # fmt: skip
    axes.annotate(
        f"{_si(c.flops_per_second)}FLOP/s, matrix product", (high, c.flops_per_second),
        xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8.5, color=INK,
    )  # fmt: skip
    middle = (low * ridge) ** 0.5
    axes.annotate(
        f"{_si(c.bytes_per_second)}B/s,\ncopy", (middle, middle * c.bytes_per_second),
        xytext=(-8, 4), textcoords="offset points", ha="right", fontsize=8.5, color=INK,
    )  # fmt: skip
    axes_title(axes, "operations with matrix products or declared FLOPs (area: time)")
    axes.set_xlabel("FLOPs per byte", fontsize=9, color=PALE)
    axes.set_ylabel("FLOP/s achieved", fontsize=9, color=PALE)
    axes.tick_params(labelsize=8, colors=PALE)
    axes.grid(which="major", color=GRID, linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS)


def _free_place(
    axes: Any, x: float, y: float, taken: list[tuple[float, float]], tall: float, wide: float
) -> tuple[float, float]:
    """An offset in points at which a number overlaps no other."""
    import math

    box = axes.get_window_extent()
    scale = 72 / axes.figure.dpi
    px = math.log(x) / math.log(wide) * box.width * scale
    py = math.log(y) / math.log(tall) * box.height * scale
    for dx, dy in ((0, 0), (13, 4), (-13, 4), (5, 14), (5, -14), (20, -8), (-20, -8), (0, 24)):
        if all(abs(px + dx - a) > 11 or abs(py + dy - b) > 11 for a, b in taken):
            break
    taken.append((px + dx, py + dy))
    return dx, dy


def _floors(axes: Any, report: ProfileReport, rows: list[OperationGroup], step: float) -> None:
    for number, row in enumerate(rows):
        floor = row.floor(report.ceilings)
        axes.barh(-number, row.seconds, 0.7, color="#d9e4ee", zorder=2)
        axes.barh(-number, min(floor, row.seconds), 0.7, color=BLUE, zorder=3)
        share = f", {floor / row.seconds:.0%}" if row.seconds and row.cost.bytes else ""
        axes.annotate(
            f"{_ms(row.seconds)}{share}", (row.seconds, -number), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks([-n for n in range(len(rows))], [_short(r.name) for r in rows], fontsize=8.5)
    axes.set_xlim(0, 1.3 * max((r.seconds for r in rows), default=1.0))
    axes.set_ylim(-max(len(rows), 1) + 0.4, 0.6)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes_title(axes, f"longest of {_ms(step)} ms a step; dark: the roofline's floor", loc="right")


def _heading(figure: Any, report: ProfileReport, title: str) -> None:
    c = report.config
    name = c.model.name or f"SiT {c.model.width} wide, {c.model.depth} deep"
    rates = ", ".join(
        f"{p.kernels} {p.line['images_per_s']:,.1f} images/s" for p in report.profiles
    )
    heading(
        figure,
        f"{name}, batch {c.training.global_batch:,}, {c.training.precision}, on {report.device}: "
        f"{title}",
        f"{rates}; {'; '.join(report.said)}",
    )


def _short(name: str) -> str:
    return shortened(name.removeprefix("aten::").removeprefix("_"), 34)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f}"


def _si(value: float) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
