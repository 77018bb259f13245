"""The records of suite.jsonl: what was found, a line each, and what need not be found again."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu_suite.plan import Record

FILE, TABLE, LOG = "suite.jsonl", "table.txt", "log.txt"
PROFILE = "profile.json"


def append(out: Path, records: Iterable[Record]) -> None:
    """Add lines to suite.jsonl, on the disk when this returns: what follows may be killed."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    with (out / FILE).open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path) -> list[Record]:
    """Return the records of a folder's suite.jsonl; a line that a kill cut in two is left out."""
    path, records = folder / FILE, []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def now() -> str:
    """Return the time as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def take_in(earlier: Path | None, out: Path) -> None:
    """Begin out/suite.jsonl with what `earlier`, and `out` itself, have recorded.

    Raises ValueError where `earlier` has no suite.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = {json.dumps(record): None for record in load(out)}
    if earlier is not None:
        if not (earlier / FILE).is_file():
            raise ValueError(f"--resume: {earlier} has no {FILE}")
        lines |= {json.dumps(record): None for record in load(earlier)}
        for file in (earlier / PROFILE, *earlier.glob("*.xml")):
            if file.is_file() and not (out / file.name).exists():
                shutil.copy(file, out / file.name)
    whole = out / f"{FILE}.new"
    whole.write_text("".join(line + "\n" for line in lines))
    whole.replace(out / FILE)


def ended(records: Iterable[Record], stage: str, context: Record, since: str = "") -> set[str]:
    """Return the keys of a stage's items that this commit and device need not run again: those
    that came to their end and those that failed with this very code, but none that was cut off.

    since: a time as in `utc`; older records count for nothing.
    """
    same = (
        r for r in records
        if r.get("stage") == stage and all(r.get(k) == context[k] for k in ("git", "device"))
    )  # fmt: skip
    return {
        r["item"] for r in same
        if "seconds" in r and not r.get("cut") and r.get("utc", "") >= since
        and (not r.get("failed") or r.get("code") == context["code"])
    }  # fmt: skip
