"""An evaluation as a record: for programs, and beside the run whose images it is of."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrepa.errors import worded
from fastrepa.reading.evaluations import EVALUATIONS
from fastrepa.runtime.files import append_lines

if TYPE_CHECKING:
    from fastrepa.commands.evaluate.evaluate import Evaluation


def evaluation_record(done: Evaluation) -> dict[str, Any]:
    """Return all of it, for a file of records."""
    from fastrepa.training.telemetry import git_state, versions

    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": versions(),
        "samples": done.samples,
        "reference": done.reference,
        "num_samples": done.num_samples,
        "num_reference": done.num_reference,
        "generated": done.settings,
        "metrics": done.scores,
        "extractors": done.extractors,
        "warnings": list(done.notes),
        "seconds": round(done.seconds, 3),
    }


def keep_beside(run: Path, record: Mapping[str, Any]) -> str | None:
    """Add a record to a run's evaluations.jsonl; returns why it could not be, in words.

    The run may be training: nobody else writes that file but other evaluations, each of which adds
    a line at its end.
    """
    path = run / EVALUATIONS
    try:
        if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
            with path.open("ab") as file:  # of an evaluation that was cut short: not one with ours
                file.write(b"\n")
        append_lines(path, [record])
    except OSError as e:
        return f"{path}: cannot be written ({worded(e)}); this evaluation is not kept there"
    return None
