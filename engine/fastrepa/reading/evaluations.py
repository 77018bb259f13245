"""evaluations.jsonl as it is found: what `fastrepa evaluate` measured of a run's images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrepa.errors import DataError, worded
from fastrepa.reading.text import parse_json

EVALUATIONS = "evaluations.jsonl"
_SAMPLER = ("sampler", "steps", "cfg", "guidance_low", "guidance_high", "precision", "seed")


@dataclass(frozen=True)
class Measured:
    """One evaluation: of which weights, how many images were drawn and how, against what, and the
    metrics by name. `utc` is ISO 8601.
    """

    utc: str
    step: int
    ema: str
    num: int
    sampler: str
    reference: str
    scores: dict[str, float]


def read_evaluations(run: Path) -> tuple[list[Measured], int]:
    """Return a run's evaluations in the order they were made, and how many lines are broken.

    Raises DataError where the file is there and cannot be read.
    """
    path = run / EVALUATIONS
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({worded(e)})") from None
    found = [_measured(line, path) for line in lines if line.strip()]
    kept = [one for one in found if one is not None]
    return kept, len(found) - len(kept)


def _measured(line: bytes, path: Path) -> Measured | None:
    """Read a line; None for what `evaluate` does not write."""
    try:
        record: Any = parse_json(line, str(path))
        made = record["generated"]
        how = [f"{key} {made[key]}" for key in _SAMPLER if key in made]
        return Measured(
            str(record["utc"]), int(made["checkpoint_step"]), str(made["ema"]),
            int(record["num_samples"]), ", ".join(how), str(record["reference"]),
            {str(name): float(value) for name, value in record["metrics"].items()},
        )  # fmt: skip
    except (DataError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
