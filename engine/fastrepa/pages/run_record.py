"""A run folder as it is found: going on, finished or just begun, its last line half written.

Reads files alone and needs neither torch nor a valid configuration: runs of other versions count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastrepa.errors import DataError, nearest, printable
from fastrepa.reading.evaluations import EVALUATIONS, Measured, read_evaluations
from fastrepa.reading.metrics import read_metrics
from fastrepa.reading.text import read_json, read_yaml

_STEP = re.compile(r"step_([0-9]{7}|[1-9][0-9]{7,18})(\.png)?")  # others' names do not count


@dataclass(frozen=True)
class RunRecord:
    """`lines` are those of metrics.jsonl in order of their steps, one for each step, null as NaN.

    `config` and `environment` are empty where the file is missing or damaged; `notes` says so.
    `logged` is when metrics.jsonl was last written; `evaluations` are those of `fastrepa evaluate`.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, float]]
    samples: dict[int, Path]
    checkpoints: list[int]
    logged: datetime | None
    evaluations: list[Measured]
    notes: list[str]

    @property
    def step(self) -> int:
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def steps(self) -> int | None:
        """The run's training.steps, where the configuration says it."""
        steps = self.setting("training.steps")
        return steps if isinstance(steps, int) else None

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key; None where there is none."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Every run, each under the shortest name that tells it from the others.

    Raises DataError for a folder that is missing, is no run, or is given twice.
    """
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise DataError(f"{folder}: is given twice")
        seen.add(folder.resolve())
    names = map(printable, _names([folder.resolve().parts for folder in folders]))
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    length = 1
    while length < max(map(len, paths)) and len({p[-length:] for p in paths}) < len(paths):
        length += 1
    return ["/".join(p[-length:]) for p in paths]


def _read_run(folder: Path, name: str) -> RunRecord:
    if not folder.is_dir():
        known = sorted(p.name for p in folder.parent.glob("*/")) if folder.parent.is_dir() else []
        raise DataError(f"{folder}: no such run folder{nearest(folder.name, known)}")
    metrics = folder / "metrics.jsonl"
    if not (folder / "config.yaml").exists() and not metrics.exists():
        raise DataError(f"{folder}: is no run folder: it has no config.yaml and no metrics.jsonl")
    notes: list[str] = []
    found = read_metrics(metrics)
    if count := len(found.others):
        notes.append(f"{count} line{'s' * (count > 1)} of metrics.jsonl left out: broken")
    lines = found.by_step()
    evaluations, broken = read_evaluations(folder)
    if broken:
        notes.append(f"{broken} line{'s' * (broken > 1)} of {EVALUATIONS} left out: broken")
    return RunRecord(
        folder=folder,
        name=name,
        config=_read_mapping(folder / "config.yaml", read_yaml, notes),
        environment=_read_mapping(folder / "environment.json", read_json, notes),
        lines=lines,
        samples=_by_step(folder / "samples"),
        checkpoints=list(_by_step(folder / "checkpoints")),
        logged=datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if lines else None,
        evaluations=evaluations,
        notes=notes,
    )


def _read_mapping(path: Path, read: Any, notes: list[str]) -> dict[str, Any]:
    try:
        found = read(path) if path.exists() else None
    except DataError:
        found = "damaged"
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} {'is missing' if found is None else 'cannot be read'}")
    return {}


def _by_step(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _STEP.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf: lists of values are leaves, those of mappings are
    not, and of what is empty there is nothing.
    """
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(v, dict) for v in value):
            value = {str(i): v for i, v in enumerate(value)}
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        elif value != []:
            yield f"{prefix}{key}", value
