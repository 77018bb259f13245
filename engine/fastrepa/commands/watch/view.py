"""A run as `watch` shows it: the page of `report`, made anew when something in the run changes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrepa.errors import DataError, printable, worded
from fastrepa.pages.page import Live, from_template, render, script
from fastrepa.pages.run_record import RunRecord, read_runs
from fastrepa.pages.summary import duration, last
from fastrepa.reading.evaluations import EVALUATIONS
from fastrepa.reading.text import read_json
from fastrepa.runtime.ownership import holder

FOLDERS = ("", "samples", "checkpoints", "probe")  # what the page is made of lies here
FILES = (
    "config.yaml", "environment.json", "metrics.jsonl", EVALUATIONS, "probe/probe.json",
    "probe/heat_map.png",
)  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Body:
    """An answer: bytes with a tag that changes with them."""

    data: bytes
    tag: str


class View:
    """One run, which may not have begun; every method may be called from any thread."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._seen: tuple[Any, ...] = ()
        self._page = Body(b"", "")

    def page(self) -> Body:
        """The run's page as it is now."""
        with self._lock:
            busy = holder(self.run)
            seen = (busy, *_traces(self.run))
            if seen != self._seen or not self._page.data:
                record = self.record()
                text = render([record], Live(_now(record, busy)))
                self._page, self._seen = _body(text.encode()), seen
            return self._page

    def record(self) -> RunRecord:
        """Read the run; an empty one, with a note, where there is nothing to read yet, or a link
        leads out of it.
        """
        try:
            for name in FILES:
                if not self._holds(self.run / name):
                    raise DataError(f"{name} is a link that leads out of the run")
            return read_runs([self.run])[0]
        except (DataError, OSError) as e:  # not begun, or removed meanwhile
            name = printable(self.run.resolve().name)
            return RunRecord(
                self.run, name, config={}, environment={}, lines=[], samples={}, checkpoints=[],
                logged=None, evaluations=[], notes=[f"waiting: {worded(e)}"],
            )  # fmt: skip

    def sample(self, step: int) -> Body | None:
        """The grid of this step; None where there is none, or a link leads out of the run."""
        path = self.run / "samples" / f"step_{step:07d}.png"
        with suppress(OSError):
            if self._holds(path) and path.is_file():
                data = path.read_bytes()
                return _body(data) if data.startswith(PNG) else None
        return None

    def _holds(self, path: Path) -> bool:
        """Tell whether a path ends inside the run, there or not."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.run))

    def draw_page(self, most: int) -> Body:
        """The page that asks what to draw; `most`: images at once."""
        record = self.record()
        sample = record.setting("sample")
        sample = sample if isinstance(sample, dict) else {}
        text = from_template(
            "draw.html",
            script=script("draw.js"),
            name=record.name,
            classes=self._classes(record),
            most=most,
            cfg=sample.get("cfg", 1.0),
            steps=sample.get("steps", 50),
        )
        return _body(text.encode())

    def _classes(self, record: RunRecord) -> list[str]:
        """Names of the classes, as far as the newest checkpoint has them."""
        for step in record.checkpoints[-1:]:
            path = self.run / "checkpoints" / f"step_{step:07d}" / "state.json"
            with suppress(OSError, DataError, KeyError, TypeError):
                if self._holds(path):
                    return [str(name) for name in read_json(path)["classes"]]
        return []


def _body(data: bytes) -> Body:
    return Body(data, f'"{hashlib.sha256(data).hexdigest()[:32]}"')


def _traces(run: Path) -> Iterator[tuple[str, int, int]]:
    """Name, time and size of all that the page depends on."""
    for folder in FOLDERS:
        try:
            entries = sorted(os.scandir(run / folder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if entry.name.endswith((".log", ".tmp", ".lock")):
                continue
            with suppress(OSError):
                found = entry.stat()
                yield f"{folder}/{entry.name}", found.st_mtime_ns, found.st_size


def _now(record: RunRecord, busy: str) -> dict[str, Any]:
    """The first lines of the page: who works on the run, how far it is, how fast."""
    rate, seconds = last(record, "images_per_s", 1), last(record, "step_seconds", 1)
    steps, step = record.steps or 0, record.step
    figures = [("step", f"{step:,} of {steps:,}" if steps else f"{step:,}")] if step else []
    if rate is not None:
        figures.append(("throughput", f"{rate:,.4g} images/s"))
    if seconds is not None:
        figures.append(("a step", f"{seconds:.3g} s"))
    if busy and seconds is not None and step < steps:
        figures.append(("left", duration(seconds * (steps - step))))
    if record.logged:
        figures.append(("last logged", f"{record.logged:%Y-%m-%d %H:%M:%S UTC}"))
    idle = "nobody works on this run" if record.config or record.lines else "not begun yet"
    words = f"At work: {busy}." if busy else f"Idle: {idle}."
    return {"state": words, "step": step, "steps": steps, "figures": figures}
