"""One-line mutations of the code, each of which a test must notice: `make mutations`.

A row of tests/mutation_rows is a defect that somebody could make: a file, a text that stands in it
once, what it becomes, and the test that must fail. The tree is copied, each test is run as it is
and must pass, then with each of its mutations in turn, and must fail. `python -m tests.mutations
NAME...` runs those whose name, file or test contains one of the words; `--list` says what there is.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.mutation_rows import core, rooms

ROOT = Path(__file__).parents[1]
TIMEOUT = 900  # seconds of one test


@dataclass(frozen=True)
class Mutation:
    """A mutation. file: from the root. old: stands in it once. test: what pytest is given."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def problem(self, root: Path) -> str:
        """Say why it cannot be applied, '' where it can."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} is not there"
        if (found := path.read_text(encoding="utf-8").count(self.old)) != 1:
            return f"{self.old!r} stands in {self.file} {found} times, not once"
        if not (root / self.test.partition("::")[0]).is_file():
            return f"{self.test} is not there"
        return ""


MUTATIONS = tuple(Mutation(*row) for row in (*core.ROWS, *rooms.ROWS))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test's process: killed, survived, or why that is not known."""

    verdict: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.verdict == "killed"


def run_test(copy: Path, test: str) -> tuple[int | None, str]:
    """Return (pytest's exit status, None for too long a run; its last line) in a copied tree."""
    paths = (copy / "engine", copy / "kernels", copy)
    # Bytecode is valid by second and size: that of a file before its mutation might be taken.
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    try:
        done = subprocess.run(
            command, cwd=copy, env=env, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None, f"took more than {TIMEOUT} s"
    return done.returncode, (done.stdout + done.stderr).strip().rpartition("\n")[2]


def judge(copy: Path, mutation: Mutation) -> Outcome:
    """Apply one mutation to a copied tree, run its test, and put the file back."""
    path, started = copy / mutation.file, time.perf_counter()
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        status, last = run_test(copy, mutation.test)
    finally:
        path.write_text(before, encoding="utf-8")
    # 1: tests failed. Anything else (no test, an import that fails) shows nothing of the test.
    words = {0: "survived", 1: "killed", None: last}.get(status, f"exit status {status}: {last}")
    return Outcome(words, time.perf_counter() - started)


def copied_tree(root: Path, folder: Path) -> Path:
    """The tree without environments, version control, bytecode and runs."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
    shutil.copytree(root, folder, ignore=left_out, symlinks=True)
    return folder


def run(root: Path, mutations: Sequence[Mutation], jobs: int, console: Console) -> int:
    """The exit status: 0 where every mutation was killed, 1 where one was not, 2 where a row does
    not fit the tree or a test fails without any mutation.
    """
    if problems := [f"{m.name}: {why}" for m in mutations if (why := m.problem(root))]:
        console.print("\n".join(problems), markup=False, style="red")
        return 2
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            copies.put(copied_tree(root, Path(folder) / f"tree{i}"))

        def in_a_copy(work: Callable[[Path], Any]) -> Any:
            copy = copies.get()
            try:
                return work(copy)
            finally:
                copies.put(copy)
                progress.advance(task)

        tests = sorted({m.test for m in mutations})
        with Progress(console=console) as progress, ThreadPoolExecutor(jobs) as pool:
            task = progress.add_task("tests as they are", total=len(tests))
            plain = list(pool.map(lambda t: in_a_copy(lambda c: run_test(c, t)), tests))
            if broken := [
                f"{test} fails without a mutation: {last}"
                for test, (status, last) in zip(tests, plain, strict=True)
                if status != 0
            ]:
                console.print("\n".join(broken), markup=False, style="red")
                return 2
            task = progress.add_task("mutations", total=len(mutations))

            def judged(mutation: Mutation) -> Outcome:
                outcome = in_a_copy(lambda copy: judge(copy, mutation))
                if not outcome.killed:  # at once: the table is minutes away
                    console.print(f"{mutation.name}: {outcome.verdict}", markup=False, style="red")
                return outcome

            found = list(pool.map(judged, mutations))
    table = Table("mutation", "file", "test", "verdict", "s")
    for mutation, outcome in zip(mutations, found, strict=True):
        colour = "green" if outcome.killed else "red"
        table.add_row(
            mutation.name, mutation.file, mutation.test, f"[{colour}]{outcome.verdict}",
            f"{outcome.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    left = sum(not outcome.killed for outcome in found)
    console.print(f"{len(found)} mutations, {left} survived")
    return 1 if left else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="of a name, file or test; none: all mutations")
    parser.add_argument("--list", action="store_true", help="say what there is and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (1)")
    given = parser.parse_args(arguments)
    chosen = [
        m
        for m in MUTATIONS
        if not given.words or any(word in f"{m.name} {m.file} {m.test}" for word in given.words)
    ]
    if given.list or not chosen:
        for m in chosen or MUTATIONS:
            print(f"{m.name}: {m.file} ({m.test})")
        return 0 if given.list else 2
    console = Console(width=None if sys.stdout.isatty() else 200)
    return run(ROOT, chosen, max(1, given.jobs), console)


if __name__ == "__main__":
    sys.exit(main())
