"""Parts that several measurements share: their command lines, and run folders seen from outside."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrepa.checkpoint.format import checkpoints, step_number


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.MODULE`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics.jsonl, which may be growing."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_of(run: Path) -> list[int]:
    """Return the steps that a run has logged."""
    return [line["step"] for line in logged(run)]


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint that has its name; 0 where there is none."""
    return max((step_number(p) or 0 for p in checkpoints(run)), default=0)


def until(
    true: Callable[[], object], what: str, seconds: float = 120.0, pause: float = 0.002
) -> None:
    """Wait until it is so, looking every `pause` seconds. Raises TimeoutError saying `what`."""
    ends = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)
