"""The kernel tests on the device: side by side in several processes, none stopping the others."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu_suite.plan import Item, Record, Size


def items(stage: str, size: Size, out: Path) -> Iterator[Item]:
    for key, arguments in size.tests:
        yield Item(key, partial(_tests, arguments, out / f"{key}.xml"), limit=140, estimate=25)


def _tests(arguments: tuple[str, ...], report: Path) -> Iterator[Record]:
    """Numbers of tests by how they ended; the first lines of what failed."""
    import pytest

    status = pytest.main([*arguments, "-p", "no:cacheprovider", f"--junitxml={report}"])
    counts, failed = outcomes(report)
    record: Record = {"arguments": list(arguments), "status": int(status), **counts}
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        record |= {"problem": f"{len(failed)} tests failed", "tests": failed}
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
