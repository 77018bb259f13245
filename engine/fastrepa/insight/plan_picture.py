"""The plan as stacked bars: memory per GPU, and the step, across the numbers of GPUs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrepa.errors import ConfigError
from fastrepa.insight.plan import STEP_PARTS, Estimate, Plan
from fastrepa.insight.sharding import PARTS

# One colour per part, kin beside kin: weights and what belongs to them, networks, the rest.
MEMORY_COLOURS = dict(
    zip(
        PARTS,
        ("#1f4e79", "#3f7cac", "#7fb0d3", "#2a7f62", "#7cc4a4", "#e08e45", "#8e6bb0", "#c3a6d8",
         "#8c8c8c", "#d4d4d4"),
        strict=True,
    )
)  # fmt: skip
STEP_COLOURS = dict(
    zip(
        STEP_PARTS,
        ("#e08e45", "#f2c48d", "#8e6bb0", "#c3a6d8", "#2a7f62", "#8c8c8c", "#c0392b"),
        strict=True,
    )
)
INK, PALE = "#222222", "#666666"


def save_plan_picture(plan: Plan, path: Path) -> None:
    """Write the PNG. ConfigError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = plan.rows
    figure = Figure(figsize=(max(11.0, 4 + 2.6 * len(rows)), 5.6), dpi=150)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.79, bottom=0.2, wspace=0.18)
    memory, time = figure.subplots(1, 2)
    ways = [(r.configured, r.cheapest) for r in rows]
    _bars(
        memory,
        [[(e.memory if e else None) for e in pair] for pair in ways],
        MEMORY_COLOURS, 1e9, "{:.1f} GB",
    )  # fmt: skip
    memory.axhline(plan.gpu.memory / 1e9, color="#c0392b", linewidth=1.2, linestyle=(0, (5, 3)))
    memory.annotate(
        f"{plan.gpu.memory / 1e9:.0f} GB", (1, plan.gpu.memory / 1e9),
        xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points",
        ha="right", fontsize=8, color="#c0392b",
    )  # fmt: skip
    highest = max(e.total for pair in ways for e in pair if e) / 1e9
    memory.set_ylim(0, max(highest, plan.gpu.memory / 1e9) * 1.12)
    _bars(
        time,
        [[(e.step if e else None) for e in pair] for pair in ways],
        STEP_COLOURS, 1e-3, "{:,.0f} ms",
    )  # fmt: skip
    time.margins(y=0.12)
    for axes, title in ((memory, "memory per GPU, GB"), (time, "one step, ms")):
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes.set_xticks(range(len(rows)), [_label(*pair) for pair in ways], fontsize=8)
        axes.tick_params(axis="y", labelsize=8, color="#999999", labelcolor=PALE)
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize=8,
            frameon=False, labelcolor=INK, handlelength=1, handleheight=1, columnspacing=1.4,
        )  # fmt: skip
    c = plan.config
    name = c.model.name or f"SiT {c.model.width} x {c.model.depth}"
    figure.text(
        0.06, 0.945, f"{name}, {plan.workload.parameters.numel / 1e6:,.0f} M parameters, "
        f"batch {c.training.global_batch:,}, on {plan.gpu.title}",
        fontsize=13, fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    figure.text(
        0.06, 0.895, "left of each pair: as configured; right: the cheapest setting that fits. "
        f"Estimates from datasheet speeds at {plan.assumptions.efficiency:.0%} of peak, "
        "not measurements.",
        fontsize=9, color=PALE, va="center",
    )  # fmt: skip
    data = io.BytesIO()
    figure.savefig(data, format="png")
    try:
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise ConfigError(f"--png: {path}: cannot be written ({error.strerror})") from None


def _bars(
    axes: Any,
    groups: Sequence[Sequence[dict[str, float] | None]],
    colours: dict[str, str],
    unit: float,
    form: str,
) -> None:
    """Pairs of stacked bars; a part that is nowhere visible is left out of the legend."""
    width = 0.36
    totals = [sum(parts.values()) for group in groups for parts in group if parts]
    shown: set[str] = set()
    for i, group in enumerate(groups):
        for k, parts in enumerate(group):
            x = i + (k - 0.5) * (width + 0.04)
            if parts is None:
                axes.annotate(
                    "nothing\nfits", (x, 0), xytext=(0, 4), textcoords="offset points",
                    ha="center", fontsize=8, color="#c0392b",
                )  # fmt: skip
                continue
            bottom = 0.0
            for part, colour in colours.items():
                value = parts[part] / unit
                if value * unit < 0.004 * max(totals):
                    bottom += value
                    continue
                axes.bar(
                    x, value, width, bottom=bottom, color=colour, edgecolor="white", linewidth=0.6,
                    label=None if part in shown else part,
                )  # fmt: skip
                shown.add(part)
                bottom += value
            axes.annotate(
                form.format(bottom), (x, bottom), xytext=(0, 2.5), textcoords="offset points",
                ha="center", fontsize=8, color=INK,
            )  # fmt: skip


def _label(configured: Estimate, cheapest: Estimate | None) -> str:
    def way(e: Estimate) -> str:
        s = e.sharding
        how = ", ckpt" if s.checkpointing == "blocks" else ""
        return f"Z{s.stage}, {s.forwards}x{s.micro}{how}"

    count = configured.sharding.world
    right = way(cheapest) if cheapest else "-"
    return f"{count:,} GPU{'s' if count > 1 else ''}\n{way(configured)}  |  {right}"
