"""Runs side by side as one HTML page that needs nothing but itself.

The page (parts/) holds its data, pictures, style and script; its content policy forbids it
to load anything. Without scripts it still shows all but the curves.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fastrepa import __version__
from fastrepa.config import config_from_dict
from fastrepa.data.images import read_rgb
from fastrepa.errors import ConfigError, DataError, printable
from fastrepa.pages.curves import (
    LEARNING,
    curves,
    evaluation_title,
    is_evaluation,
    panels,
)
from fastrepa.pages.run_record import RunRecord, flattened
from fastrepa.reading.text import dump_yaml, read_json
from fastrepa.runtime.regions import NAMES
from fastrepa.runtime.terminal import quoted, typed

PICTURES, ALL_PICTURES = 24, 48  # sample grids of a run, and of all of them, at most
PICTURE_SIDE = 880  # pixels; larger grids are reduced
LAST = 10  # log lines whose mean is a run's last value
_ABSENT = object()


def render(runs: Sequence[RunRecord]) -> str:
    """The page, as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastrepa.pages", "parts"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    steps = [_chosen(list(run.samples), ALL_PICTURES // len(runs)) for run in runs]
    # Notes what it cannot read, so it comes before the notes.
    grids = [_grids(run, chosen) for run, chosen in zip(runs, steps, strict=True)]
    shown = panels(runs)
    data = {
        "runs": [run.name for run in runs],
        "curves": {panel.key: curves(runs, panel.key) for panel in shown},
    }
    page = files("fastrepa.pages") / "parts"
    return environment.get_template("report.html").render(
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        summary=_summary(runs),
        last=LAST,
        notes=[(run.name, note) for run in runs for note in run.notes],
        differences=_config_table(runs),
        groups=list(dict.fromkeys(panel.group for panel in shown)),
        panels=shown,
        grids=grids,
        sample_steps=sorted({grid["step"] for of_run in grids for grid in of_run}),
        blocks=[probed for run in runs if (probed := _blocks(run))],
        times=_times(runs),
        environment=_table([_shown_environment(run.environment) for run in runs]),
        reproduce=[_reproduce(run) for run in runs],
        report_command=" ".join(["fastrepa report", *(typed(run.folder) for run in runs)]),
        # A closing tag inside the data would end the script element.
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        style=(page / "report.css").read_text(encoding="utf-8"),
        script=(page / "report.js").read_text(encoding="utf-8"),
    )


def _visible(value: Any) -> Any:
    """Return a text with escapes for what steers its display; HTML's signs are jinja's part."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return "\n".join(map(printable, value.split("\n")))
    return value


# Summary --------------------------------------------------------------------------------------


def _summary(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return (name, a text for each run) of what some run has."""
    rows: dict[str, list[str]] = {
        "state": [_state(run) for run in runs],
        "model": [_model(run) for run in runs],
        "aligned to": [_aligned(run) for run in runs],
        "data": [_text(run.setting("data.path")) for run in runs],
        "batch": [_text(run.setting("training.global_batch")) for run in runs],
    }
    for key, title, _ in LEARNING[:3]:
        rows[title] = [_number(_last(run, key)) for run in runs]
    evaluations = sorted(
        {k for run in runs for line in run.lines for k in line if is_evaluation(k)}
    )
    for key in evaluations:
        rows[evaluation_title(key)] = [_evaluation(run, key) for run in runs]
    rows["images/s"] = [_number(_median(run, "images_per_s")) for run in runs]
    rows["MFU"] = [_share(_median(run, "mfu")) for run in runs]
    rows["peak memory"] = [_scaled(_last(run, "peak_memory_bytes", 1), 1e-9, "GB") for run in runs]
    rows["time so far"] = [_duration(_last(run, "seconds", 1)) for run in runs]
    rows["skipped steps"] = [_count(_last(run, "skipped_steps", 1)) for run in runs]
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


def _last(run: RunRecord, key: str, count: int = LAST) -> float | None:
    values = _values(run, key)[-count:]
    return float(values.mean()) if len(values) else None


def _median(run: RunRecord, key: str) -> float | None:
    # The first line holds the start: compilation, cold caches.
    values = _values(run, key)
    return float(np.median(values[1:] if len(values) > 1 else values)) if len(values) else None


def _evaluation(run: RunRecord, key: str) -> str:
    last = [(line["step"], line[key]) for line in run.lines if key in line]
    return f"{_number(last[-1][1])} at step {last[-1][0]:,.0f}" if last else ""


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


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _steps(steps: Sequence[int]) -> str:
    if len(steps) > 6:
        return f"{len(steps)}, steps {steps[0]:,} to {steps[-1]:,}"
    return ", ".join(f"{step:,}" for step in steps)


# Tables of keys -------------------------------------------------------------------------------


def _table(columns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `key`, `cells` (a text for each column) and `differs`, those that differ first."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = []
    for key in keys:
        values = [column.get(key, _ABSENT) for column in columns]
        cells = ["not set" if v is _ABSENT else _cell(v) for v in values]
        rows.append({"key": key, "cells": cells, "differs": len(set(cells)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _cell(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _config_table(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Tabulate what differs between the runs' configurations; of one run, from the defaults."""
    names = [run.name for run in runs]
    columns = [dict(flattened(run.config)) for run in runs]
    if len(runs) == 1:
        names = [*names, "default"]
        defaults = dict(flattened(_defaults(runs[0].config))) if columns[0] else {}
        # What was auto is a number in a run's configuration, and nobody set it.
        resolved = [key for key, value in defaults.items() if value == "auto"]
        columns = [
            {key: value for key, value in column.items() if key not in resolved}
            for column in (columns[0], defaults)
        ]
    for column in columns:
        column.pop("run", None)
    rows = _table(columns) if all(columns) else []
    return {"names": names, "rows": [row for row in rows if row["differs"]]}


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The defaults that go with a configuration's data set, codec and model; {} if it has none."""
    data, model = config.get("data", {}), config.get("model", {})
    shape = ("name", "width", "depth", "heads", "patch")
    try:
        return config_from_dict(
            {
                "run": config["run"],
                "data": {"path": data["path"]},
                "model": {key: model[key] for key in shape if model.get(key) is not None},
            }
        ).model_dump(mode="json")
    except (ConfigError, KeyError, TypeError, AttributeError):
        return {}


def _shown_environment(environment: dict[str, Any]) -> dict[str, Any]:
    return dict(flattened({k: v for k, v in environment.items() if k != "command"}))


# Pictures -------------------------------------------------------------------------------------


def _chosen(steps: Sequence[int], most: int) -> list[int]:
    """Choose at most so many of the steps, and PICTURES, evenly spread, with first and last."""
    most = min(most, PICTURES)
    if len(steps) <= most:
        return list(steps)
    places = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[place] for place in places]


def _grids(run: RunRecord, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Return `step`, `uri`, `width` and `height` of every grid of these steps that can be read."""
    out = []
    for step in steps:
        try:
            uri, width, height = _embedded(run.samples[step])
        except DataError:  # being written, or damaged
            run.notes.append(f"samples/{run.samples[step].name} cannot be read")
            continue
        out.append({"step": step, "uri": uri, "width": width, "height": height})
    return out


def _embedded(path: Path, side: int = PICTURE_SIDE) -> tuple[str, int, int]:
    """A picture as a data URI of WebP, at most `side` pixels a side, and its size."""
    from PIL import Image

    image = Image.fromarray(read_rgb(path))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size


def _blocks(run: RunRecord) -> dict[str, Any] | None:
    """The picture and the words of `fastrepa probe RUN`, where it has been run."""
    folder = run.folder / "probe"
    try:
        uri, width, height = _embedded(folder / "heat_map.png", side=2 * PICTURE_SIDE)
        said = [str(line) for line in read_json(folder / "probe.json")["said"]]
    except (OSError, DataError, KeyError, TypeError):
        return None
    return {"name": run.name, "uri": uri, "width": width, "height": height, "said": said}


# Time -----------------------------------------------------------------------------------------


def _times(runs: Sequence[RunRecord]) -> dict[str, Any]:
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


# Again ----------------------------------------------------------------------------------------


def _reproduce(run: RunRecord) -> dict[str, Any]:
    """The commands that make the run again, and its configuration as a file to keep."""
    environment, file = run.environment, _file_name(run)
    ranks, git, command = (environment.get(key) for key in ("world_size", "git", "command"))
    ranks = ranks if isinstance(ranks, int) else 1
    git = git if isinstance(git, dict) else {}
    words = [str(word) for word in command] if isinstance(command, list) else []
    launch = "fastrepa" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m fastrepa"
    lines = []
    if re.fullmatch("[0-9a-f]{7,64}", str(git.get("sha"))):
        lines.append(f"git checkout {git['sha']}")
    if run.config:
        lines.append(f"{launch} train {typed(file)} {quoted(f'run=runs/{file[:-5]}')}")
    text = dump_yaml(run.config) if run.config else ""
    return {
        "name": run.name,
        "started": " ".join(["fastrepa", *map(quoted, words[1:])]) if words else "",
        "ranks": ranks,
        "dirty": bool(git.get("dirty")),
        "commands": "\n".join(lines),
        "config": text,
        "file": file,
        "uri": "data:text/yaml;base64," + base64.b64encode(text.encode()).decode(),
    }


def _file_name(run: RunRecord) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in run.name) + ".yaml"
