"""Runs side by side as one HTML page that needs nothing but itself.

The page (parts/) holds its data, pictures, style and script; its content policy forbids it
to load anything. Without scripts it still shows all but the curves.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fastrepa import __version__
from fastrepa.config import config_from_dict
from fastrepa.data.images import read_rgb
from fastrepa.errors import ConfigError, DataError, printable
from fastrepa.pages.curves import curves, panels
from fastrepa.pages.heat import HIGHEST, LOWEST, HeatMap, heat_colours, heat_maps
from fastrepa.pages.run_record import RunRecord, flattened
from fastrepa.pages.summary import LAST, summary, times
from fastrepa.reading.text import dump_yaml, read_json
from fastrepa.runtime.terminal import quoted, typed

PICTURES, ALL_PICTURES = 24, 48  # sample grids of a run, and of all of them, at most
LIVE_PICTURES = 400  # which are not loaded before they are shown
PICTURE_SIDE = 880  # pixels; larger grids are reduced
HEAT_COLUMNS, HEAT_WRITTEN, HEAT_LABELS = 60, 10, 5  # of a heat map: at most; with numbers; named
_ABSENT = object()


@dataclass(frozen=True)
class Live:
    """The part of the page of one run that it has while it is served, and a file has not.

    now: `state`, a sentence on who works on the run; `step`, `steps`; `figures`, as they are shown.
    """

    now: dict[str, Any]


def render(runs: Sequence[RunRecord], live: Live | None = None) -> str:
    """The page, as text; `live`: as it is served, where it asks for its pictures and for news."""
    if live:
        steps = _chosen(list(runs[0].samples), LIVE_PICTURES)
        grids = [[{"step": step, "uri": f"samples/{step}.png", "size": None} for step in steps]]
    else:
        most = min(PICTURES, ALL_PICTURES // len(runs))
        # Notes what it cannot read, so it comes before the notes.
        grids = [_grids(run, _chosen(list(run.samples), most)) for run in runs]
    shown = panels(runs)
    data = {
        "runs": [run.name for run in runs],
        "curves": {panel.key: curves(runs, panel.key) for panel in shown},
    }
    return from_template(
        "report.html",
        live=live,
        script=script("report.js", *(["live.js"] if live else [])),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        summary=summary(runs),
        last=LAST,
        notes=[(run.name, note) for run in runs for note in run.notes],
        differences=_config_table(runs),
        groups=list(dict.fromkeys(panel.group for panel in shown)),
        panels=shown,
        grids=grids,
        sample_steps=sorted({grid["step"] for of_run in grids for grid in of_run}),
        blocks=[probed for run in runs if (probed := _blocks(run))],
        times=times(runs),
        environment=_table([_shown_environment(run.environment) for run in runs]),
        scale=(LOWEST, HIGHEST, [heat_colours(np.array([[i / 16]]))[0][0][0] for i in range(17)]),
        reproduce=[_reproduce(run) for run in runs],
        report_command=" ".join(["fastrepa report", *(typed(run.folder) for run in runs)]),
        # A closing tag inside the data would end the script element.
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )


def from_template(name: str, /, *, script: str, **values: Any) -> str:
    """A page from a template of parts/, which may run this script and no other."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastrepa.pages", "parts"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(
        version=__version__, style=_part("report.css"), script=script, allowed=allowed(script),
        **values,
    )  # fmt: skip


def script(*names: str) -> str:
    """The text of these scripts of parts/, one after the other."""
    return "".join(map(_part, names))


def allowed(script: str) -> str:
    """The word by which a content policy allows this script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _part(name: str) -> str:
    return (files("fastrepa.pages") / "parts" / name).read_text(encoding="utf-8")


def _visible(value: Any) -> Any:
    """Return a text with escapes for what steers its display; HTML's signs are jinja's part."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return "\n".join(map(printable, value.split("\n")))
    return value


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
    """Choose at most so many of the steps, evenly spread, with first and last."""
    if len(steps) <= most:
        return list(steps)
    places = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[place] for place in places]


def _grids(run: RunRecord, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Return `step`, `uri` and `size` of every grid of these steps that can be read."""
    out = []
    for step in steps:
        try:
            uri, *size = _embedded(run.samples[step])
        except DataError:  # being written, or damaged
            run.notes.append(f"samples/{run.samples[step].name} cannot be read")
            continue
        out.append({"step": step, "uri": uri, "size": size})
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
    """Return the findings of `fastrepa probe RUN`: heat maps, or only their picture; or None."""
    folder = run.folder / "probe"
    try:
        record = read_json(folder / "probe.json")
        said = [str(line) for line in record["said"]]
    except (OSError, DataError, KeyError, TypeError):
        return None
    found: dict[str, Any] = {"name": run.name, "said": said, "maps": [], "picture": None}
    try:
        found["maps"] = [_heat_map(heat, record) for heat in heat_maps(record)]
    except (KeyError, TypeError, ValueError, AttributeError):  # an older record, or a foreign one
        try:
            found["picture"] = _embedded(folder / "heat_map.png", side=2 * PICTURE_SIDE)
        except DataError:
            return None
    return found


def _heat_map(heat: HeatMap, record: dict[str, Any]) -> dict[str, Any]:
    """A table: the steps over its columns, and rows of `block`, `aligned` and `cells`, each with a
    number, and the colours of its ground and its text.
    """
    count = len(record["steps"])
    columns = np.unique(np.linspace(0, count - 1, min(count, HEAT_COLUMNS)).round().astype(int))
    steps = [int(record["steps"][i]) for i in columns]
    every = -(-len(steps) // HEAT_LABELS)
    values, colours = heat.values[:, columns], heat_colours(heat.shares[:, columns])
    return {
        "title": heat.title,
        "reference": heat.reference,
        "written": len(steps) <= HEAT_WRITTEN,
        "steps": [
            {"step": step, "short": _thousands(step), "shown": i % every == 0}
            for i, step in enumerate(steps)
        ],
        "rows": [
            {
                "block": int(block),
                "aligned": block == record.get("aligned_block"),
                "cells": [
                    (heat.form.format(value) if ground else "", ground, ink)
                    for value, (ground, ink) in zip(row, shades, strict=True)
                ],
            }
            for block, row, shades in zip(record["blocks"], values, colours, strict=True)
        ],
    }


def _thousands(step: int) -> str:
    return f"{step / 1000:g}K" if step >= 1000 else str(step)


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
