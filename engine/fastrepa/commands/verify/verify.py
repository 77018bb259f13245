"""`fastrepa data verify`: everything that is wrong with a data set, not only the first."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Column, Table

from fastrepa.commands.verify.check_reference import plan_reference
from fastrepa.commands.verify.check_shards import plan_shards, repairs
from fastrepa.commands.verify.checks import Check, FileProblem, Findings, leftovers, run_checks
from fastrepa.data.datasets import is_data, located
from fastrepa.data.format.reference_layout import IMAGES, LATENTS
from fastrepa.data.format.shards import MANIFEST
from fastrepa.errors import DataError
from fastrepa.reading.text import is_address
from fastrepa.runtime.hardware import usable_cores
from fastrepa.runtime.terminal import as_json, counted, print_table

SHOWN = 50
"""Problems that are printed; the JSON has them all."""

Layout = Literal["shards", "reference"]


@dataclass(frozen=True)
class VerifyReport:
    """All that was checked in a data set, and every problem of it.

    columns: rows checked of each; num_bytes: of the files that were read; notes: what is not wrong,
    but worth a look; repairs: what mends the problems. Counts are of what was there to check;
    `quick` leaves them 0, files apart.
    """

    path: Path
    layout: Layout
    quick: bool
    problems: list[FileProblem]
    notes: list[str]
    num_files: int
    num_images: int
    columns: dict[str, int]
    num_bytes: int
    seconds: float
    repairs: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> str:
        """The whole report, for programs."""
        return as_json({"ok": self.ok, **asdict(self), "path": str(self.path)}, indent=2)


def verify(
    path: str | Path, *, workers: int | None = None, progress: bool = True, quick: bool = False
) -> VerifyReport:
    """Check the data set in folder `path`, in either layout, and list all that is wrong with it.

    Shards: every file's size and SHA-256; counts; indices; labels; tar members; every image's
    CRC-32, decodability and size; every row of every column. The reference layout: pairing by name,
    labels, every image and every .npy. Files that belong to no set are notes.

    Args:
        workers: processes; None: one per available core; 0 or 1: this process.
        progress: show a progress bar.
        quick: only what needs no image and no row: files, sizes, indices, counts, pairing.

    DataError when `path` is no data set of either layout.
    """
    started = time.monotonic()
    folder = located(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such data set (make one with `fastrepa prepare`)")
    if is_address(folder) and not is_data(folder):
        raise DataError(f"{folder / MANIFEST}: not there, so it is no address of a prepared set")
    findings = Findings(notes=leftovers(folder))
    plan: Callable[..., list[Check]]
    layout: Layout
    try:
        if (folder / MANIFEST).exists() or any(folder.glob("shard-*.tar")):
            layout, plan = "shards", plan_shards
        elif (folder / IMAGES).is_dir() or (folder / LATENTS).is_dir():  # sound or not
            layout, plan = "reference", plan_reference
        else:
            raise DataError(
                f"{folder}: no data set: it holds neither {MANIFEST} (made by `fastrepa prepare`) "
                f"nor {IMAGES}/ or {LATENTS}/ (the reference layout)"
            )
        checks = plan(folder, findings, quick=quick)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    if is_address(folder):
        workers = 1  # its connections and its cache are this process's
    workers = usable_cores() if workers is None else workers
    run_checks(checks, workers, progress, findings.problems.extend)
    return VerifyReport(
        path=folder,
        layout=layout,
        quick=quick,
        problems=findings.problems,
        notes=findings.notes,
        num_files=findings.num_files,
        num_images=0 if quick else findings.num_images,
        columns={} if quick else findings.columns,
        num_bytes=0 if quick else findings.num_bytes,
        seconds=time.monotonic() - started,
        repairs=repairs(folder, findings.problems)
        if layout == "shards" and not is_address(folder)
        else [],
    )


def print_report(report: VerifyReport, console: Console) -> None:
    """The first SHOWN problems and their count, or a table of what was checked; and the notes."""
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for problem in report.problems[:SHOWN]:
        console.print(str(problem), soft_wrap=True)
    if (more := len(report.problems) - SHOWN) > 0:
        console.print(f"... and {more} more (--json lists them all)")
    if not report.ok:
        said = f"{counted(len(report.problems), 'problem')} in {report.path}"
        console.print(said, soft_wrap=True)
        for repair in report.repairs:
            console.print(repair, soft_wrap=True)
        return
    console.print(f"{report.path}: nothing wrong", soft_wrap=True)
    how = " (quick)" if report.quick else ""
    table = Table(f"checked{how}", Column("how much", justify="right"))
    table.add_row("files" + (", sizes only" if report.quick else ""), f"{report.num_files:,}")
    if not report.quick:
        table.add_row("images", f"{report.num_images:,}")
    for name, rows in report.columns.items():
        table.add_row(f"{name}, rows", f"{rows:,}")
    if not report.quick:
        table.add_row("MB", f"{report.num_bytes / 1e6:,.1f}")
    table.add_row("seconds", f"{report.seconds:.1f}")
    if not report.quick:
        table.add_row("MB/s", f"{report.num_bytes / 1e6 / max(report.seconds, 1e-9):,.1f}")
    print_table(console, table)
