"""The progress bar: what it says, and what of it is left where there is no terminal."""

import io
import re

import pytest
from rich.console import Console

from fastrepa.runtime.progress import BYTES, Bar, Figures, counted


def drawn(terminal, **settings):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None, width=100)
    with Bar("some [red] thing", 10, console=console, **settings) as bar:
        bar.move(5)
        bar.advance(2)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_that_stays_leaves_its_last_state(terminal):
    text = drawn(terminal, unit="images", done=3, rate=True, stays=True)
    assert "some [red] thing" in text  # a file's name, not a colour
    assert "7/10 images, " in text
    assert "/s" in text


@pytest.mark.parametrize(("width", "fit"), [(60, 1), (80, 3), (120, 4)])
def test_a_bar_of_many_figures_is_one_line_of_whole_ones(width, fit):
    figures = {"loss": "0.1234", "align": "0.123", "img/s": "70", "memory": "1.2 GB"}
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=width)
    how = {"stays": True, "more": Figures(), "console": console}
    with Bar("training", 1600, "steps", done=93, **how) as bar:
        bar.move(100, **figures, skipped=None)
    line = out.getvalue().split("\x1b[2K")[-1].partition("\n")[0]
    assert len(line) <= width - 3  # room for the ^C that a terminal echoes
    words = " · ".join(f"{name} {value}" for name, value in [*figures.items()][:fit])
    assert re.search(rf" 100/1600 steps {re.escape(words)} +-:--:--$", line)


def test_others_need_a_terminal():
    assert drawn(False) == drawn(False, unit=BYTES) == drawn(True, shown=False) == ""
    assert "7/10 bytes" in drawn(True, unit=BYTES)


def test_a_loop_is_counted_and_not_changed():
    assert list(counted([3, 1, 2], "counting")) == [3, 1, 2]
