"""The doctor's findings: one line of its report, and how values are written there."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from fastrepa.errors import worded

SECTIONS = ("versions", "devices", "fast paths", "system")


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
