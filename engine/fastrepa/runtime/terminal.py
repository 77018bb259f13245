"""The one way to the screen: what a file or a name says is shown there, and steers nothing.

Control characters, line ends and marks that turn the direction of writing become escapes, and
rich's markup in a text is text. Styles are given as such (`rich.text.Text`, `style=`).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fastrepa.errors import printable


class Terminal(Console):
    """rich's console, without markup. A text is one line; of a `Text` line ends are such."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """Make of a text what is shown: before it is measured, so that tables stay straight."""
        return super().render_str(printable(text), **how)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is shown of anything: also of a Text, whose line ends are segments."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable() or segment.text == "\n":
                yield segment
            else:
                lines = "\n".join(map(printable, segment.text.split("\n")))
                yield Segment(lines, segment.style)


def say(*lines: object, file: IO[str] | None = None) -> None:
    """Print lines, at once and unfolded; a line end inside of one is an escape."""
    file = file or sys.stdout
    # One write, the lines' ends included: ranks share the terminal.
    file.write("".join(f"{printable(line)}\n" for line in lines))
    file.flush()


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 shard", "2,000 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def as_json(value: Any, indent: int | None = None) -> str:
    """Return JSON that is safe on a terminal, and readable there beyond ASCII."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON."""
    say(*as_json(value, indent).split("\n"))


def quoted(word: object) -> str:
    """A word as it can be typed into a shell, bash where it holds what no screen shows."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_in_quotes, text)) + "'"


def typed(path: object) -> str:
    """A path as it can be typed into a shell: not as an option, nor as a home folder."""
    text = str(path)
    if text.startswith("~"):
        text = os.path.abspath(text)
    return quoted(f"./{text}" if text.startswith("-") else text)


def _in_quotes(c: str) -> str:
    """A character inside bash's $'...'."""
    if c.isprintable():
        return f"\\{c}" if c in "\\'" else c
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        code -= 0xDC00
        return f"\\x{code:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\U{code:08x}"
