"""The one way to the screen: what a file or a name says is shown there, and steers nothing.

Control characters, line ends and marks that turn the direction of writing become escapes, and
rich's markup in a text is text. Styles are given as such (`rich.text.Text`, `style=`).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fastrepa.errors import printable

if TYPE_CHECKING:
    from rich.table import Column, Table

_FOLDED = 16  # columns that a text keeps, at least, when it is folded
_INDENT = 3


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


def print_table(console: Console, table: Table) -> None:
    """Print a table so that it reads at any width: no number and no name is cut short.

    One that is wider than the screen (in a pipe: 80) first breaks its headings, then folds its
    texts; where its numbers alone do not fit, each row becomes a paragraph.
    """
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = column.justify == "right"
    if _width(table) > console.width:
        for column in table.columns:
            if column.justify == "right":
                column.header = Text(_plain(column.header).replace(" ", "\n"))
    if _width(table, folded=True) > console.width:
        table.padding = (0, 1, 0, 0)
    if _width(table, folded=True) <= console.width:
        console.print(table)
    else:
        _print_list(console, table)


def _width(table: Table, *, folded: bool = False) -> int:
    """Columns of the screen that a table takes, its texts whole or folded."""
    _, right, _, left = table.padding
    width = len(table.columns) * (left + right + 1) + 1
    for column in table.columns:
        whole = max((_widest(cell) for cell in (*column.cells, column.header)), default=0)
        width += whole if column.no_wrap or not folded else min(whole, _FOLDED)
    return width


def _widest(cell: object) -> int:
    return max((cell_len(line) for line in _plain(cell).split("\n")), default=0)


def _plain(cell: object) -> str:
    """The text of a cell as it is shown; of a `Text` line ends are such."""
    if isinstance(cell, Text):
        return "\n".join(map(printable, cell.plain.split("\n")))
    return printable(cell)


def _print_list(console: Console, table: Table) -> None:
    """Print a paragraph for each row: its first cell, and below it what the columns say."""
    if table.title:
        console.print(Text(_plain(table.title), "italic"), overflow="fold")
    cells = [list(column.cells) for column in table.columns]
    for number, row in enumerate(table.rows):
        name = cells[0][number]
        head = name if isinstance(name, Text) else Text(_plain(name), row.style or "bold")
        if number and table.rows[number - 1].end_section:
            console.print()
        console.print(head, overflow="fold")
        _print_values(console, table.columns[1:], [column[number] for column in cells[1:]])


def _print_values(console: Console, columns: Sequence[Column], cells: list[object]) -> None:
    """Print `heading value` after `heading value`, broken between two where there is room."""
    from rich.padding import Padding

    def put(line: Text) -> None:
        line.overflow = "fold"
        console.print(Padding(line, (0, 0, 0, _INDENT)))

    line = Text()
    for column, cell in zip(columns, cells, strict=True):
        if not _plain(cell):
            continue
        heading = _plain(column.header).replace("\n", " ")
        value = cell.copy() if isinstance(cell, Text) else Text(_plain(cell))
        pair = Text.assemble((f"{heading} " if heading else "", "dim"), value)
        if line and _INDENT + cell_len(f"{line.plain} · {pair.plain}") > console.width:
            put(line)
            line = Text()
        line = Text.assemble(line, " · ", pair) if line else pair
    if line:
        put(line)


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
