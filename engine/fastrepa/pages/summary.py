"""The last values of runs in words, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrepa.pages.curves import LEARNING, evaluation_title, is_evaluation
from fastrepa.pages.run_record import RunRecord
from fastrepa.runtime.regions import NAMES

LAST = 10  # log lines whose mean is a run's last value


def summary(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return (name, a text for each run) of what some run has."""
    rows: dict[str, list[str]] = {
        "state": [_state(run) for run in runs],
        "model": [_model(run) for run in runs],
        "aligned to": [_aligned(run) for run in runs],
        "data": [_text(run.setting("data.path")) for run in runs],
        "batch": [_text(run.setting("training.global_batch")) for run in runs],
    }
    for key, title, _ in LEARNING[:3]:
        rows[title] = [_number(last(run, key)) for run in runs]
    evaluations = sorted(
        {k for run in runs for line in run.lines for k in line if is_evaluation(k)}
    )
    for key in evaluations:
        rows[evaluation_title(key)] = [_evaluation(run, key) for run in runs]
    rows["images/s"] = [_number(median(run, "images_per_s")) for run in runs]
    rows["MFU"] = [_share(median(run, "mfu")) for run in runs]
    rows["peak memory"] = [_scaled(last(run, "peak_memory_bytes", 1), 1e-9, "GB") for run in runs]
    rows["time so far"] = [duration(last(run, "seconds", 1)) for run in runs]
    rows["skipped steps"] = [_count(last(run, "skipped_steps", 1)) for run in runs]
    rows["checkpoints"] = [_steps(run.checkpoints) for run in runs]
    return [(what, cells) for what, cells in rows.items() if any(cells)]


def _state(run: RunRecord) -> str:
    if not run.lines or run.logged is None:
        return "nothing logged yet"
    if run.steps and run.step >= run.steps:
        return f"finished: {run.step:,} steps"
    of = f" of {run.steps:,}" if run.steps else ""
    return f"not finished: step {run.step:,}{of}, logged {run.logged:%Y-%m-%d %H:%M UTC}"


def _model(run: RunRecord) -> str:
    model = run.setting("model")
    model = model if isinstance(model, dict) else {}
    if model.get("name"):
        return str(model["name"])
    if not model:
        return ""
    shape = (model.get(key, "?") for key in ("width", "depth", "heads", "patch"))
    return "SiT, width {}, depth {}, heads {}, patch {}".format(*shape)


def _aligned(run: RunRecord) -> str:
    encoders = run.setting("vision.encoders")
    if not isinstance(encoders, list):
        return ""
    if not encoders:
        return "nothing"
    names = ", ".join(str(e.get("name")) for e in encoders if isinstance(e, dict))
    block, weight = run.setting("alignment.block"), run.setting("alignment.weight")
    return f"{names}, block {block}, weight {weight}"


def _values(run: RunRecord, key: str) -> np.ndarray[Any, Any]:
    values = np.array([line[key] for line in run.lines if key in line], dtype=np.float64)
    return values[np.isfinite(values)]


def last(run: RunRecord, key: str, count: int = LAST) -> float | None:
    values = _values(run, key)[-count:]
    return float(values.mean()) if len(values) else None


def median(run: RunRecord, key: str) -> float | None:
    # The first line holds the start: compilation, cold caches.
    values = _values(run, key)
    return float(np.median(values[1:] if len(values) > 1 else values)) if len(values) else None


def _evaluation(run: RunRecord, key: str) -> str:
    found = [(line["step"], line[key]) for line in run.lines if key in line]
    return f"{_number(found[-1][1])} at step {found[-1][0]:,.0f}" if found else ""


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _scaled(value: float | None, factor: float, unit: str) -> str:
    return "" if value is None else f"{_number(value * factor)} {unit}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _count(value: float | None) -> str:
    return "" if not value else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _steps(steps: Sequence[int]) -> str:
    if len(steps) > 6:
        return f"{len(steps)}, steps {steps[0]:,} to {steps[-1]:,}"
    return ", ".join(f"{step:,}" for step in steps)


def times(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """A step of every run by region: rows of milliseconds, and bars on one scale."""
    each = [_step_by_region(run) for run in runs]
    longest = max((sum(parts.values()) for parts in each), default=0.0)
    used = [name for name in NAMES if any(parts.get(name) for parts in each)]
    rows = [
        {
            "name": name,
            "title": name.replace("_", " "),
            "cells": [
                f"{1e3 * parts[name]:,.1f} ms, {parts[name] / sum(parts.values()):.1%}"
                if parts
                else ""
                for parts in each
            ],
        }
        for name in used
    ]
    bars = [
        {
            "run": run.name,
            "total": f"{1e3 * sum(parts.values()):,.1f} ms",
            "parts": [
                (name, f"{100 * parts[name] / longest:.3f}") for name in used if parts.get(name)
            ],
            "text": ", ".join(
                f"{name.replace('_', ' ')} {parts[name] / sum(parts.values()):.0%}"
                for name in used
                if parts[name]
            ),
        }
        for run, parts in zip(runs, each, strict=True)
        if parts
    ]
    return {"rows": rows, "bars": bars}


def _step_by_region(run: RunRecord) -> dict[str, float]:
    """Seconds of a mean step by region, over all log lines but the first, which holds the start."""
    lines = [line for line in run.lines if {"step_seconds", *NAMES} <= line.keys()]
    if not lines:
        return {}
    before = 0.0
    total, steps = dict.fromkeys(NAMES, 0.0), 0.0
    for line in lines:
        count, before = line["step"] - before, line["step"]
        if line is lines[0] and len(lines) > 1:
            continue
        steps += count
        for name in NAMES:
            total[name] += line[name] * line["step_seconds"] * count
    return {name: seconds / steps for name, seconds in total.items()}
