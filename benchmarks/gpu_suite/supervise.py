"""Starting the process of a stage, following it, and killing it alone when it takes too long.

The process (child.py) is started while the stage before still runs, so that what it imports costs
no device time, and begins when it is given its task. It tells through a pipe, a JSON object a line:
`context` (commit, device and versions, for records), `due` (keys of its items), `begin`, `limit`
and `logged` (an item, its seconds, and how long the log is), `end`, `left` (an item for which the
time does not reach).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import SOURCES
from benchmarks.gpu_suite import records
from benchmarks.gpu_suite.plan import SIZES, Record, Stage
from benchmarks.provenance import ROOT

PROGRAM = [sys.executable, "-m", "benchmarks.gpu_suite.child"]
MOST = 200_000
"""Characters of what a process said that a record keeps, from the end."""
POISONED = 3
"""Exit status of a child in which a failed item left the device unusable."""


@dataclass
class SuiteRun:
    """The state that the stages of one call share."""

    out: Path
    size: str
    ends: float  # time.monotonic() at which everything has to be over
    cache: Path
    again: frozenset[str] = frozenset()
    started: str = field(default_factory=records.now)
    context: Record = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.out / records.LOG

    def environment(self) -> dict[str, str]:
        """Caches that all stages share, the sources, and no waiting for a hub that is not there."""
        path = [str(ROOT), *SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        }


class Child:
    """A stage's process, and what its messages told."""

    def __init__(self, stage: Stage, run: SuiteRun) -> None:
        self.stage, self.run = stage, run
        self.due: list[str] | None = None
        self.left: list[str] = []
        self.item, self.limit = "", 0.0
        self.messages, writing = os.pipe()
        self._unread = b""
        with run.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, stage.name, str(writing)],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writing],
                start_new_session=True, env=run.environment(),
            )  # fmt: skip
        os.close(writing)
        self.began, self.logged = time.monotonic(), run.log.stat().st_size

    def go(self, ends: float) -> None:
        """Give it its task; time.monotonic() is the same clock in all processes."""
        task = {
            "out": str(self.run.out), "size": self.run.size, "ends": ends,
            "context": self.run.context,
            "since": self.run.started if self.stage.name in self.run.again else "",
        }  # fmt: skip
        self.began = time.monotonic()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, which is seen below
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def follow(self, ends: float) -> str:
        """Take its messages until it is over; return why it did not come to its end, or ''."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.messages, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if now >= ends:
                    return "cut off: the stage's time is over"
                late = self.began + self.limit if self.item else ends
                if now >= late:
                    return f"killed after {self.limit:g} s, its limit"
                if selector.select(min(ends, late) - now) and not self._take():
                    break
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "killed: it did not end"
        if code in (0, POISONED):
            return ""
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"

    def _take(self) -> bool:
        """Read what the pipe has; False at its end."""
        data = os.read(self.messages, 65536)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            self.run.context |= message.get("context", {})
            self.due = message.get("due", self.due)
            self.left += [message["left"]] if "left" in message else []
            if "begin" in message:
                self.item, self.limit = message["begin"], message["limit"]
                self.began, self.logged = time.monotonic(), message["logged"]
            if "end" in message:
                self.item = ""
        return bool(data)

    def said(self) -> str:
        """Return what it wrote since its item, or itself, began."""
        with self.run.log.open("rb") as file:
            file.seek(self.logged)
            return file.read().decode(errors="replace")[-MOST:]

    def kill(self) -> None:
        """End its whole process group; a training step's own ends with it (turn.py)."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        os.close(self.messages)


def run_stage(child: Child, run: SuiteRun) -> Record:
    """Let a stage's waiting process run, and others after it for what it left when it died, to the
    end or the budget's; record that and return the record.
    """
    stage, began = child.stage, time.monotonic()
    ends = min(began + stage.seconds, run.ends)
    due: list[str] | None = None
    starts = 2  # that may fail
    while True:
        child.go(ends)
        try:
            why = child.follow(ends)
        finally:
            child.kill()
        due = child.due if due is None else due
        if why:
            print(f"{stage.name}: {child.item or 'its start'}: {why}", flush=True)
            _record(
                run, stage, item=child.item, failed=True, cut=why.startswith("cut off"),
                problem=why, seconds=round(time.monotonic() - child.began, 1), stderr=child.said(),
            )  # fmt: skip
            starts -= not child.item
        if not starts or time.monotonic() >= ends or child.process.returncode == 0:
            break
        child = Child(stage, run)
    took = round(time.monotonic() - began, 1)
    return _record(run, stage, due=due or [], left=child.left, took=took)


def start_compilers(run: SuiteRun) -> list[subprocess.Popen[bytes]]:
    """Start the processes that compile what the rows will launch (precompile.py)."""
    count = SIZES[run.size].compilers
    command = [sys.executable, "-m", "benchmarks.gpu_suite.precompile", run.size]
    with run.log.open("ab") as log:
        return [
            subprocess.Popen(
                [*command, str(n), str(count)], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, env=run.environment(),
            )
            for n in range(count)
        ]  # fmt: skip


def _record(run: SuiteRun, stage: Stage, **values: Any) -> Record:
    record = {"stage": stage.name, **values, **run.context, "utc": records.now()}
    records.append(run.out, [record])
    return record
