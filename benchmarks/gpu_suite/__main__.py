"""The command line: which stages, for how long, where to."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from benchmarks import gpu_suite
from benchmarks.common import command_line
from benchmarks.gpu_suite import records
from benchmarks.gpu_suite.plan import DALI, STAGES, Stage
from benchmarks.gpu_suite.summary import table
from benchmarks.gpu_suite.supervise import Child, SuiteRun, run_stage, start_compilers

FEWEST = 5.0
"""Seconds for which no stage is started."""


def options() -> argparse.ArgumentParser:
    names = [stage.name for stage in STAGES]
    parser = command_line("gpu_suite", gpu_suite.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder outside the tree")
    parser.add_argument("--resume", type=Path, help="an earlier --out, to go on from")
    parser.add_argument("--minutes", type=float, default=9.2)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=", ".join(names))
    which.add_argument("--dali", action="store_true", help="only the stage dali")
    parser.add_argument(
        "--again", nargs="+", choices=names, default=[], metavar="STAGE",
        help="stages to run though they are recorded",
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="toy shapes on the CPU")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "fastrepa-gpu-suite",
        help="compiled kernels, for this and later calls",
    )  # fmt: skip
    return parser


def _due(given: argparse.Namespace) -> list[Stage]:
    if given.only:
        return [stage for stage in STAGES if stage.name in given.only]
    return [DALI] if given.dali else list(STAGES)


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    given = options().parse_args(arguments)
    try:
        records.take_in(given.resume, given.out)
    except (OSError, ValueError) as error:
        options().error(str(error))
    signal.signal(signal.SIGTERM, _stop)
    run = SuiteRun(
        out=given.out.resolve(), size="toy" if given.rehearse else "full",
        ends=started + 60 * given.minutes, cache=given.cache.resolve(),
        again=frozenset(given.again),
    )  # fmt: skip
    due, compilers = _due(given), []
    waiting: Child | None = Child(due[0], run)
    try:
        for number, stage in enumerate(due):
            if run.ends - time.monotonic() < FEWEST:
                names = ", ".join(s.name for s in due[number:])
                print(f"left for a later call: {names}", flush=True)
                break
            child, waiting = waiting or Child(stage, run), None
            if number + 1 < len(due):
                waiting = Child(due[number + 1], run)
            if stage.compiles:
                compilers = start_compilers(run)
            else:  # nothing beside what is timed
                end(compilers)
            ended = run_stage(child, run)
            print(f"{stage.name}: {ended['took']:.0f} s", flush=True)
            _write_table(run)
    finally:
        end(compilers)
        if waiting is not None:
            waiting.kill()
    print(_write_table(run))
    return 0


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def _write_table(run: SuiteRun) -> str:
    text = table(records.load(run.out))
    (run.out / records.TABLE).write_text(text + "\n")
    return text


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
