"""Ranks that are lost, frozen, suspended or signalled, and what each of the others says of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import newest, steps_of, until
from benchmarks.faults.processes import (
    LONG,
    ROOT,
    TIMEOUT,
    TINY,
    RankProcesses,
    resumed_from,
)
from fastrepa.runtime.world import outside_the_world

LATE = 4.0  # seconds that a loaded machine may add to the timeout
RANKS = (
    ("first rank frozen (SIGSTOP)", "stop 0 3"),
    ("other rank frozen (SIGSTOP)", "stop 1 3"),
    ("error in one rank's start", "raise 1 build"),
    ("rank killed as the last save begins", "kill 1 last"),
    ("SIGUSR1 to one rank (pre-emption)", "usr1 1 3"),
    ("NaN in a sample, twice in a row", "nan 1 3 4"),
)


def planted(folder: Path, fault: str, arguments: list[str]) -> dict[str, Any]:
    """Two ranks, a fault in one (tests/programs/faulty.py says which there are), and the
    same command again without it.
    """
    run = folder / "run"
    arguments = [*arguments, f"run={run}", f"survival.timeout_seconds={TIMEOUT}"]
    with RankProcesses(folder, arguments, fault=fault) as ranks:
        other = ranks.processes[1 - int(fault.split()[1])]
        code = other.wait(120)
        ended = time.time()
        said = ranks.said()
    path = run / "metrics.jsonl"
    logged = steps_of(run)[-1:] or [0]
    saved = newest(run)
    seconds = ended - path.stat().st_mtime if path.exists() else None
    with RankProcesses(folder, [*arguments, "training.steps=7"]) as ranks:
        codes = ranks.wait(120)
        resumed = resumed_from(ranks)
    return {
        "fault": fault, "exit_code": code, "seconds": seconds, "step": logged[0], "saved": saved,
        "errors": [
            line.replace(f"{ROOT}/", "").replace(f"{folder}/", "")
            for line in re.findall(r"^fastrepa: error.*$", said, re.M)
        ],
        "resumed": resumed or 0,
        "codes_again": codes,
    }  # fmt: skip


# Three ranks and more ---------------------------------------------------------------------------


def lose(folder: Path, kind: str, victim: int, *, size: int, stage: int) -> dict[str, Any]:
    """Lose a rank (`kill` or `stop`: frozen) in step 4; what each of the others ended with, when,
    and whom it blamed. It came true if all named that rank alone, in time, with exit code 76.
    """
    run = folder / "run"
    arguments = [*TINY, f"run={run}", f"zero.stage={stage}"]
    fault = f"{kind} {victim} 3"
    others = [rank for rank in range(size) if rank != victim]
    with RankProcesses(folder, [*arguments, LONG], size=size, fault=fault, warm=True) as ranks:
        until(lambda: steps_of(run)[-1:] == [3] or not ranks.running(), "a third step")
        ends = ranks.ended(others, TIMEOUT + 20)
        said = ranks.said()
    began = (run / "metrics.jsonl").stat().st_mtime if steps_of(run) else time.time()
    blamed = _blamed(said, size)
    seconds = [None if at is None else at - began for _, at in ends]
    right = all(code == 76 for code, _ in ends) and "Traceback" not in said
    right &= all(blamed[rank] == [victim] for rank in others)
    right &= all(s is not None and s <= TIMEOUT + LATE for s in seconds)
    return {
        "fault": fault, "size": size, "stage": stage, "codes": [code for code, _ in ends],
        "blamed": [blamed[rank] for rank in others], "seconds": seconds,
        "step": max(steps_of(run), default=0), "saved": newest(run), "right": right,
        "traceback": "Traceback" in said,
        "saw": "" if right else _in_words(others, [c for c, _ in ends], blamed, seconds, said),
    }  # fmt: skip


def _blamed(said: str, size: int) -> list[list[int]]:
    """Find which ranks each rank's error lines name."""
    blamed: list[set[int]] = [set() for _ in range(size)]
    for rank, text in re.findall(r"^fastrepa: error(?: \(rank (\d+)\))?: (.*)$", said, re.M):
        blamed[int(rank or 0)] |= {int(number) for number in re.findall(r"rank (\d+)", text)}
    return [sorted(ranks) for ranks in blamed]


def _in_words(
    others: Sequence[int],
    codes: Sequence[int | None],
    blamed: Sequence[Sequence[int]],
    seconds: Sequence[float | None],
    said: str,
) -> str:
    parts = []
    for rank, code, after in zip(others, codes, seconds, strict=True):
        named = " and ".join(map(str, blamed[rank])) or "none"
        late = f", {after:.1f} s" if after is not None and after > TIMEOUT + LATE else ""
        parts.append(f"rank {rank} ended with {code}{late}, naming {named}")
    return "; ".join([*parts, *(["a traceback"] if "Traceback" in said else [])])


# Suspended and signalled ------------------------------------------------------------------------


def suspended(folder: Path, *, size: int = 3, seconds: float = TIMEOUT + 3) -> dict[str, Any]:
    """Stop all ranks for longer than the timeout, one after another, and let them go on in the
    other order. It came true if they take steps again, and end well when they are told to stop.
    """
    run = folder / "run"
    with RankProcesses(folder, [*TINY, f"run={run}", LONG, "zero.stage=1"], size=size) as ranks:
        until(lambda: ranks.steps_said() > 3 or not ranks.running(), "steps")
        for process in ranks.processes:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.3)
        time.sleep(seconds)
        for process in reversed(ranks.processes):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
        at, ends = ranks.steps_said(), time.monotonic() + TIMEOUT
        until(lambda: time.monotonic() > ends or not ranks.running(), "the timeout")
        steps, alive = ranks.steps_said() - at, ranks.running()
        ranks.processes[0].send_signal(signal.SIGTERM)
        codes = [code for code, _ in ranks.ended(range(size), 60)]
        said = ranks.said()
    right = alive and steps > 3 and codes == [75] * size
    last = max(steps_of(run), default=0)
    errors = re.findall(r"^fastrepa: error.*$", said, re.M)
    return {
        "suspended": seconds, "steps_after": steps, "codes": codes, "step": last,
        "saved": newest(run), "right": right,
        "saw": f"{steps} steps after it, exit codes {codes}" + "".join(f"; {e}" for e in errors),
    }  # fmt: skip


@contextmanager
def _launched(folder: Path, arguments: Sequence[str], ranks: int) -> Iterator[subprocess.Popen]:
    """One process, or torchrun with its ranks; what they print goes to FOLDER/out.txt."""
    folder.mkdir(parents=True)
    words = ["-m", "fastrepa", "train", *arguments]
    if ranks > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    with (folder / "out.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *words], env=outside_the_world() | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield process
    finally:
        for pid in _children(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _children(pid: int) -> list[int]:
    """Find the processes that a living process started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for file in lists for word in file.read_text().split()]


def signalled(folder: Path, what: str) -> dict[str, Any]:
    """Signal a run that saved nothing yet, as `what` of SIGNALLED says. It came true if the step
    under way was saved, and it ended as one that the launch files start again.
    """
    ranks, send, codes = SIGNALLED[what]
    run = folder / "run"
    slow = ("training.global_batch=240", "training.micro_batch=4", "training.checkpoint_every=0")
    with _launched(folder, [*TINY, LONG, *slow, f"run={run}"], ranks) as process:
        until(lambda: len(steps_of(run)) > 1 or process.poll() is not None, "two steps")
        time.sleep(0.05)
        at = max(steps_of(run), default=0)
        send(process)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            code = None
    last, saved = max(steps_of(run), default=0), newest(run)
    right = 0 < at <= saved == last and (code in codes if codes else code not in (None, 0))
    return {
        "signals": what, "step": last, "at": at, "saved": saved, "exit_code": code, "right": right,
        "saw": f"signalled after step {at}, saved {saved}, exit code {code}",
    }  # fmt: skip


def _five(process: subprocess.Popen) -> None:
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)


def _thrice(process: subprocess.Popen) -> None:
    for _ in range(3):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)


def _everyone(process: subprocess.Popen) -> None:
    for pid in (process.pid, *_children(process.pid)):
        os.kill(pid, signal.SIGTERM)


# What is sent: to how many ranks, how, and the exit codes that are right; torchrun has its own.
SIGNALLED: dict[str, tuple[int, Callable[[subprocess.Popen], None], tuple[int, ...]]] = {
    "five SIGTERM in 25 ms": (1, _five, (75,)),
    "three SIGUSR1": (1, _thrice, (75,)),
    "SIGTERM to torchrun and its two ranks": (2, _everyone, ()),
}
