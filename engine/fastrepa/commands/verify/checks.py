"""Checks of a data set: what one finds, and many of them run in several processes.

A check reads one piece of a set (a file, some images, some rows) and returns its problems instead
of raising the first. So the pieces are independent: nothing that is damaged hides another damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fastrepa.data.format.partial import partial_folder
from fastrepa.data.images import UnreadableImageError, decode, open_image
from fastrepa.runtime.progress import BYTES, Bar
from fastrepa.runtime.spawn import go_on, run_jobs

# What the training's decoder turns into RGB as it should.
_MODES = ("RGB", "L")


@dataclass(frozen=True)
class FileProblem:
    """A problem of one file, or of one sample of it; `file` is relative to the set."""

    file: str
    sample: str | None
    problem: str

    def __str__(self) -> str:
        where = self.file if self.sample is None else f"{self.file}: sample {self.sample}"
        return " ".join(f"{where}: {self.problem}".split())


class Check(Protocol):
    """One piece of work: `file` and `num_bytes` are what it reads. Is sent to other processes."""

    @property
    def file(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    def run(self, go_on: Callable[[], None]) -> list[FileProblem]:
        """Every problem found. Calls `go_on` often; an OSError becomes a problem of `file`."""


@dataclass
class Findings:
    """All that is known of a set: problems, notes (not wrong, but worth a look), what was read."""

    problems: list[FileProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_files: int = 0
    num_images: int = 0
    num_bytes: int = 0
    columns: dict[str, int] = field(default_factory=dict)  # rows by name

    def wrong(self, file: str, problem: str, sample: str | None = None) -> None:
        self.problems.append(FileProblem(file, sample, problem))


def image_problem(data: bytes, side: int, image_format: str) -> str | None:
    """Say what is wrong with an encoded image that should be `side` px square; None: nothing.

    Not the training's decoder: DALI fails a whole batch without saying which image or why.
    `image_format` as Pillow names it, lower case.
    """
    try:
        image = open_image(data)
        if (image.format or "").lower() != image_format:
            return f"a {image.format} image, not {image_format.upper()}"
        if image.size != (side, side):  # before it is decoded: it may be a bomb
            return f"{image.width}x{image.height} px, not {side}x{side}"
        if image.mode not in _MODES:
            return f"of mode {image.mode}, not {' or '.join(_MODES)}"
        decode(image, data)
    except UnreadableImageError as error:
        return f"cannot be decoded ({error})"
    return None


def run_checks(
    checks: Sequence[Check],
    workers: int,
    progress: bool,
    found: Callable[[list[FileProblem]], None],
) -> None:
    """Run every check with `workers` processes (0 or 1: this one); `found` gets their problems.

    Problems come in the order of the checks. DataError when a worker is killed from outside.
    """
    total = sum(check.num_bytes for check in checks)
    shown = progress and total > 0
    with Bar("verifying", total, BYTES, shown=shown, rate=True, stays=True) as bar:

        def done(finished: Sequence[Check]) -> None:
            bar.advance(sum(check.num_bytes for check in finished))

        if (workers := min(workers, len(checks))) > 1:
            results: Iterable[list[FileProblem]] = run_jobs(
                _run_one, checks, workers, doing="verify", progress=done
            )
        else:
            results = _here(checks, done)
        for problems in results:
            found(problems)


def _here(
    checks: Sequence[Check], done: Callable[[Sequence[Check]], None]
) -> Iterable[list[FileProblem]]:
    for check in checks:
        yield _run(check, lambda: None)
        done([check])


def _run(check: Check, go_on: Callable[[], None]) -> list[FileProblem]:
    try:
        return check.run(go_on)
    except OSError as error:
        return [FileProblem(check.file, None, f"cannot be read ({error.strerror or error})")]


def _run_one(check: Check) -> list[FileProblem]:
    go_on()
    return _run(check, go_on)


def leftovers(folder: Path) -> list[str]:
    """Notes on what unfinished runs of `fastrepa prepare` left beside the set in `folder`."""
    partial = partial_folder(folder.resolve())
    if not partial.exists():
        return []
    return [f"{partial.name}: beside the set: of a fastrepa prepare unfinished, or at work now"]
