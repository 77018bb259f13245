"""The kernel tests on the device: side by side in several processes, none stopping the others."""

from __future__ import annotations

import os
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.plan import Item, Record, SuiteSize

LIMIT, TO_END = 140.0, 30.0
"""Seconds of an item, and those of them that are for ending: its report is written last."""


class InTime:
    """A plugin of pytest: after so many seconds no further test begins; what ran is reported."""

    def __init__(self, seconds: float) -> None:
        self.ends, self.over = time.monotonic() + seconds, False

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        if time.monotonic() > self.ends:
            self.over = True
            processes = self.session.config.pluginmanager.getplugin("dsession")  # xdist's
            (processes or self.session).shouldstop = "its time is over"


def items(stage: str, size: SuiteSize, out: Path) -> Iterator[Item]:
    for key, arguments in size.tests:
        yield Item(key, partial(_tests, arguments, out / f"{key}.xml"), limit=LIMIT, estimate=25)


def _tests(
    arguments: tuple[str, ...], report: Path, seconds: float = LIMIT - TO_END
) -> Iterator[Record]:
    """Numbers of tests by how they ended; the first lines of what failed."""
    import pytest

    # Inductor starts a process for each core in each process that tests.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    in_time = InTime(seconds)
    options = [*arguments, "-p", "no:cacheprovider", f"--junitxml={report}"]
    status = pytest.main(options, plugins=[in_time])
    counts, failed = outcomes(report)
    record: Record = {"arguments": list(arguments), "status": int(status), **counts}
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        late = ", and not all had run when their time was over" if in_time.over else ""
        record |= {"problem": f"{len(failed)} tests failed{late}", "tests": failed}
    yield record


def outcomes(report: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Return how many tests of a JUnit file passed, failed and were skipped, and the message of
    each that failed.
    """
    counts, failed = Counter(passed=0, failed=0, skipped=0), {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [e for e in case if e.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        counts["failed" if wrong else "skipped" if skipped else "passed"] += 1
        if wrong:
            name = f"{case.get('classname')}::{case.get('name')}"
            failed[name] = (wrong[0].get("message") or "").split("\n")[0][:300]
    return dict(counts), failed
