"""A run's numbers as curves: which there are, thinned for a screen, with a running mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrepa.generation.pictures import EVALUATION, running_mean
from fastrepa.pages.run_record import RunRecord

POINTS = 600
"""A curve has at most this many points: each is then the mean of as many log lines."""

# Key, heading and unit, in reading order; the keys of an evaluation follow their own names.
LEARNING = (
    ("loss", "loss", ""),
    ("velocity_loss", "velocity loss", ""),
    ("alignment_loss", "alignment loss", ""),
    ("grad_norm", "gradient norm", ""),
    ("lr", "learning rate", ""),
)
SPEED = (
    ("images_per_s", "throughput", "images/s"),
    ("step_seconds", "time of a step", "s"),
    ("mfu", "model FLOPs utilisation", ""),
    ("data_wait", "share of time waiting for data", ""),
    ("peak_memory_bytes", "peak memory", "GB"),
)
_NAMES = {"fid": "FID", "sfid": "sFID", "kid": "KID", "clip_score": "CLIP score"}
_HIGHER = ("precision", "recall", "inception_score", "clip_score")
_SCALES = {"peak_memory_bytes": 1e-9}
_EXACT = ("lr", "peak_memory_bytes")


@dataclass(frozen=True)
class Panel:
    """A place for the curves of one key."""

    key: str
    title: str
    unit: str
    group: str


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return the panels that some run has numbers for."""
    there = {key for run in runs for line in run.lines for key in line}
    evaluation = sorted(key for key in there if is_evaluation(key))
    losses = {key for key in there if key.endswith("_loss")}
    own = sorted(losses - {key for key, _, _ in LEARNING})  # of terms of one's own
    groups = {
        "Learning": (*LEARNING, *((key, key.replace("_", " "), "") for key in own)),
        "Evaluation": [(key, evaluation_title(key), better(key)) for key in evaluation],
        "Speed": SPEED,
    }
    return [
        Panel(key, title, unit, group)
        for group, members in groups.items()
        for key, title, unit in members
        if key in there
    ]


def is_evaluation(key: str) -> bool:
    return EVALUATION.match(key) is not None and not key.endswith("_std")


def evaluation_title(key: str) -> str:
    return _NAMES.get(key, key)


def better(key: str) -> str:
    if key.startswith("own_"):  # only its author knows
        return ""
    return f"{'higher' if key.startswith(_HIGHER) else 'lower'} is better"


def curves(runs: Sequence[RunRecord], key: str) -> list[dict[str, Any]]:
    """One object for each run that has the key: `run` (its number), and lists `step`, `seconds`,
    `value`, `mean` (equally long) and `bad`, the steps whose value was not finite.
    """
    out = []
    for number, run in enumerate(runs):
        rows = [
            (line["step"], line.get("seconds", np.nan), line[key])
            for line in run.lines
            if key in line
        ]
        if not rows:
            continue
        table = np.array(rows, dtype=np.float64)
        finite = np.isfinite(table[:, 2])
        steps, seconds, values = table[finite].T
        values = values * _SCALES.get(key, 1.0)
        exact = key in _EXACT or is_evaluation(key)  # of no noise, or seldom: no mean
        mean = running_mean(values, 1 if exact else 2 * (len(values) // 20) + 1)
        thin = [_thinned(a) for a in (steps, seconds, values, mean)] if len(values) else [[]] * 4
        out.append(
            {
                "run": number,
                **dict(zip(("step", "seconds", "value", "mean"), thin, strict=True)),
                "bad": [int(step) for step in table[~finite, 0]],
            }
        )
    return out


def _thinned(values: np.ndarray[Any, Any]) -> list[float | None]:
    """Means of POINTS runs of neighbours, the last value kept, to six digits."""
    if len(values) > POINTS:
        parts = np.array_split(values[:-1], POINTS - 1)
        values = np.append([part.mean() for part in parts], values[-1])
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]
