"""The one progress bar: what is being done, how far it is, and the time that remains."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import Any, Self, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fastrepa.errors import printable
from fastrepa.runtime.terminal import Terminal

T = TypeVar("T")
BYTES = "bytes"


class Figures(ProgressColumn):
    """Further figures, each by its name, in one line: as many as there is room for."""

    def render(self, task: Task) -> RenderableType:
        return _Fitting([f"{k} {v}" for k, v in task.fields.items() if v is not None])


class _Fitting:
    def __init__(self, figures: list[str]) -> None:
        self.figures = figures

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        shown = next(
            text
            for number in range(len(self.figures), -1, -1)
            if len(text := " · ".join(self.figures[:number])) <= options.max_width
        )
        yield Text(shown, style="cyan")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, min(len(" · ".join(self.figures)), options.max_width))


class _Progress(Progress):
    def get_renderable(self) -> RenderableType:
        return _Narrower(super().get_renderable())


class _Narrower:
    """Leaves room for the ^C that a terminal echoes: where that begins a line of its own, the bar
    before it is left behind.
    """

    def __init__(self, inner: RenderableType) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.inner, options.update_width(max(1, options.max_width - 3)))


class Bar:
    """A bar on stderr; a context, which shows it.

    total: of what, in `unit`: a word that follows the two numbers, BYTES, or "" for a share without
    numbers. done: of it, before this began. rate: say how many a second. stays: its last state is
    left behind, also where there is no terminal; otherwise it needs one and leaves nothing.
    """

    def __init__(
        self,
        text: str,
        total: float,
        unit: str = "",
        *,
        shown: bool = True,
        done: int = 0,
        rate: bool = False,
        stays: bool = False,
        more: ProgressColumn | None = None,
        console: Console | None = None,
    ) -> None:
        console = console or Terminal(stderr=True)
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
        columns.append(BarColumn(bar_width=max(6, min(32, console.width - 108)) if more else 32))
        if unit == BYTES:
            columns.append(DownloadColumn())
        elif unit:
            columns += [MofNCompleteColumn(), TextColumn(f"{unit}," if rate else unit)]
        if rate:
            columns.append(TextColumn("{task.fields[rate]}/s"))
        columns += [*([more] if more else []), TimeRemainingColumn()]
        hidden = not shown or not (stays or console.is_terminal)
        self._progress = _Progress(*columns, console=console, transient=not stays, disable=hidden)
        self._unit, self._rated, self._before = unit, rate, done
        self.done: float = done
        self._began = time.monotonic()
        self._task = self._progress.add_task(
            printable(text), total=total, completed=done, **self._rate()
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def move(self, done: float, text: str | None = None, **fields: Any) -> None:
        """Show that `done` of the total is done; `text` replaces what is being done."""
        self.done = done
        fields |= self._rate()
        text = None if text is None else printable(text)
        self._progress.update(self._task, completed=done, description=text, **fields)

    def advance(self, more: float = 1) -> None:
        """Show that so much more is done."""
        self.move(self.done + more)

    def _rate(self) -> dict[str, Any]:
        if not self._rated:
            return {}
        per_second = (self.done - self._before) / max(time.monotonic() - self._began, 1e-3)
        size = f"{per_second / 1e6:.1f} MB" if self._unit == BYTES else f"{per_second:.0f}"
        return {"rate": size}


def counted(items: Collection[T], doing: str) -> Iterator[T]:
    """The items one by one, with a bar where a terminal shows it."""
    with Bar(doing, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()
