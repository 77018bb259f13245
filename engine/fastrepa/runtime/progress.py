"""A progress bar around a loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def shown(items: Collection[T], doing: str) -> Iterator[T]:
    """The items one by one, with a bar where a terminal shows it."""
    console = Console(stderr=True)
    yield from track(items, doing, transient=True, console=console, disable=not console.is_terminal)
