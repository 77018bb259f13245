"""metrics.jsonl as it is found: lines of a run, and whatever crashes and others left between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fastrepa.errors import DataError, worded
from fastrepa.reading.text import parse_json

_MOST_STEPS = 2**53


@dataclass(frozen=True)
class Metrics:
    """lines: each as it is written and as numbers, in the order of their steps; of two lines of one
    step that say the same thing the later one. others: all that is no such line, as it is written.
    """

    lines: list[tuple[bytes, dict[str, float]]]
    others: list[bytes]

    def by_step(self) -> list[dict[str, float]]:
        """Return what is said of each step, in their order; null is NaN."""
        steps: dict[float, dict[str, float]] = {}
        for _, line in self.lines:
            steps.setdefault(line["step"], {}).update(line)
        return list(steps.values())


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.jsonl, which may be missing. Raises DataError where it cannot be read."""
    try:
        raw = path.read_bytes() if path.exists() else b""
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({worded(e)})") from None
    lines: list[tuple[bytes, dict[str, float]]] = []
    others = []
    for text in filter(bytes.strip, raw.split(b"\n")):
        numbers = _numbers(text, path)
        if numbers is None:
            others.append(text)
        else:
            lines.append((text, numbers))
    lines.sort(key=lambda line: line[1]["step"])
    kept: list[tuple[bytes, dict[str, float]]] = []
    for text, numbers in lines:
        before = kept[-1][1] if kept else {}
        if before.get("step") == numbers["step"] and len(before.keys() & numbers) > 1:
            others.append(kept.pop()[0])
        kept.append((text, numbers))
    return Metrics(kept, others)


def _numbers(text: bytes, path: Path) -> dict[str, float] | None:
    """A line's numbers; None for what no run writes."""
    try:
        record = parse_json(text, path)
        if not isinstance(record, dict) or any(isinstance(v, bool | str) for v in record.values()):
            return None
        numbers = {k: math.nan if v is None else float(v) for k, v in record.items()}
    except (DataError, TypeError, OverflowError):
        return None
    step = numbers.get("step", math.nan)
    return numbers if 0 <= step < _MOST_STEPS and step.is_integer() else None
