"""The progress bar: what it says, and what of it is left where there is no terminal."""

import io

import pytest
from rich.console import Console

from fastrepa.runtime.progress import BYTES, Bar, counted


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


def test_others_need_a_terminal():
    assert drawn(False) == drawn(False, unit=BYTES) == drawn(True, shown=False) == ""
    assert "7/10 bytes" in drawn(True, unit=BYTES)


def test_a_loop_is_counted_and_not_changed():
    assert list(counted([3, 1, 2], "counting")) == [3, 1, 2]
