"""The doctor's findings: one line of its report, and how it and its values are written."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fastrepa.errors import printable, worded

SECTIONS = ("versions", "devices", "fast paths", "system", "runs now")
MARKS = {"ok": ("✓", "green"), "off": ("–", "dim"), "broken": ("✗", "red"), "note": ("!", "yellow")}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    section: one of SECTIONS. status: "ok" | "off" (not installed, or not for this hardware) |
    "broken" (installed, fails) | "note" (works; worth knowing). detail: what was found, or why not.
    remedy: what would enable or mend it; empty where nothing is amiss.
    """

    section: str
    name: str
    status: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Probe:
    """Something to try: `package` brings `module`, without which there is nothing to try."""

    name: str
    package: str
    module: str
    remedy: str
    """What installs it."""
    run: Callable[[], list[Finding]]
    environment: dict[str, str] | None = None


def fast_path(name: str, status: str, detail: str, remedy: str = "") -> Finding:
    return Finding("fast paths", name, status, detail, remedy)


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # absent, or its metadata are damaged
        return None


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def one_line(error: BaseException | str) -> str:
    """A message that fits in a table: its first line that says something."""
    line = next((part for part in str(error).splitlines() if part.strip()), "")
    if isinstance(error, str):
        return worded(line) if line else "no message"
    kind = type(error).__name__
    return f"{kind}: {worded(line)}" if line else kind


def print_section(findings: Iterable[Finding], console: Console) -> None:
    """Print findings as a table under the name of their section."""
    table = Table(
        Column(no_wrap=True),
        Column(no_wrap=True),
        Column(overflow="fold"),
        title_justify="left",
        box=None,
        show_header=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for f in findings:
        table.title = Text(f.section, "bold")
        detail = Text(printable(f.detail), "dim" if f.status == "off" else "")
        if f.remedy:
            detail = Text("\n").join([detail, Text(f"→ {printable(f.remedy)}", "cyan")])
        table.add_row(Text(*MARKS[f.status]), f.name, detail)
    if table.row_count:
        console.print(table)
        console.print()
