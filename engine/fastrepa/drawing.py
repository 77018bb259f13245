"""The style of the house's pictures: colours, figures without a window system, headings, saving.

matplotlib is imported when a figure is made, and without pyplot: no state is shared with a caller.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fastrepa.runtime.files import write_whole

INK, PALE, AXIS, GRID = "#222222", "#666666", "#999999", "#e8e8e8"
PALETTE = {
    "navy": "#1f4e79", "blue": "#3f7cac", "sky": "#7fb0d3", "green": "#2a7f62", "mint": "#7cc4a4",
    "orange": "#e08e45", "sand": "#f2c48d", "purple": "#8e6bb0", "lilac": "#c3a6d8",
    "grey": "#8c8c8c", "silver": "#d4d4d4", "red": "#c0392b",
}  # fmt: skip
BLUE, RED = PALETTE["blue"], PALETTE["red"]

TITLE_FROM_TOP, BELOW_FROM_TOP = 0.27, 0.43  # inches


def palette(names: str) -> tuple[str, ...]:
    """Return colours of PALETTE by their names, spaces between them."""
    return tuple(PALETTE[name] for name in names.split())


def new_figure(width: float, height: float, **options: Any) -> Any:
    """Return an empty matplotlib Figure of `width` x `height` inches, at 150 dots each or `dpi`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **{"dpi": 150, **options})
    FigureCanvasAgg(figure)
    return figure


def heading(figure: Any, title: str, below: str, *, left: float = 0.015) -> None:
    """Write a title and paler lines at the top; `left` is a share of the width."""
    height = figure.get_figheight()
    figure.text(
        left, 1 - TITLE_FROM_TOP / height, title, fontsize=12.5, fontweight="bold", color=INK,
        va="center",
    )  # fmt: skip
    figure.text(
        left, 1 - BELOW_FROM_TOP / height, below, fontsize=8.5, color=PALE, va="top",
        linespacing=1.4,
    )  # fmt: skip


def axes_title(axes: Any, text: str, *, loc: str = "left", **kwargs: Any) -> None:
    """Write the title of one panel."""
    axes.set_title(text, loc=loc, fontsize=10, fontweight="bold", color=INK, **kwargs)


def colour_legend(axes: Any, handles: list[Any], names: list[str], **kwargs: Any) -> None:
    """Write the legend of coloured areas, without a frame."""
    axes.legend(
        handles, names, frameon=False, labelcolor=INK, handlelength=1, handleheight=1,
        columnspacing=1.3, **kwargs,
    )  # fmt: skip


def readable_on(colour: str) -> str:
    """Return the colour of text on an area of `colour`, "#rrggbb"."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 140 else INK


def shortened(name: str, most: int) -> str:
    """Return a name of at most `most` characters, its middle left out where it is longer."""
    end = round(0.27 * most)
    return name if len(name) <= most else f"{name[: most - 1 - end]}…{name[-end:]}"


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG, after it was drawn; OSError where it cannot be written."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_whole(path, data.getvalue())
