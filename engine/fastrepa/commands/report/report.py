"""`fastrepa report`: runs side by side, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastrepa.errors import ConfigError, writing
from fastrepa.pages.page import render
from fastrepa.pages.run_record import read_runs
from fastrepa.runtime.files import aside

MAX_RUNS = 8  # as many as there are colours that can be told apart


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of these runs, by default RUN/report.html, of several report.html here;
    returns its absolute path.

    Raises DataError for what is no run, ConfigError for a file that is no HTML or cannot be
    written.
    """
    if not 1 <= len(folders) <= MAX_RUNS:
        raise ConfigError(f"report: takes 1 to {MAX_RUNS} runs, got {len(folders)}")
    runs = read_runs(folders)
    if out is None:
        out = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out: {out}: expected a file that ends in .html")
    page = render(runs)
    with writing(f"--out: {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with aside(out) as partial:
            partial.write_text(page, encoding="utf-8")
    return out.absolute()
