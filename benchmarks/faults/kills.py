"""A run is killed again and again, and compared bit by bit with an undisturbed one."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import newest, steps_of, until
from benchmarks.faults.processes import (
    TIMEOUT,
    RankProcesses,
    losses_of,
    resumed_from,
    tensors,
)

MOMENTS = ("save", "step", "save", "any")


def _partials(run: Path) -> set[tuple[str, int]]:
    """Folders of saves under way, told apart from those that an earlier process left."""
    found = set()
    for path in (run / "checkpoints").glob(".step_*.tmp"):
        try:
            found.add((path.name, path.stat().st_ino))
        except OSError:  # it has just got its name
            continue
    return found


def kills(
    folder: Path, arguments: list[str], *, count: int, steps: int, seed: int, size: int = 2
) -> dict[str, Any]:
    """Kill a run `count` times and let it finish; what came of it, beside an undisturbed run.

    Raises RuntimeError where the run hangs, does not resume, or ends before all kills are done.
    """
    draw = random.Random(seed)
    arguments = [
        *arguments, f"training.steps={steps}", f"survival.timeout_seconds={TIMEOUT}",
        "training.log_every=1",
    ]  # fmt: skip
    began = time.monotonic()
    whole, killed = folder / "whole", folder / "killed"
    with RankProcesses(whole, [*arguments, f"run={whole / 'run'}"], size=size) as ranks:
        until(lambda: steps_of(whole / "run") or not ranks.running(), "a first step")
        start = time.monotonic() - began
        if any(ranks.wait(300)):
            raise RuntimeError(ranks.said())
    run, lives = killed / "run", []
    arguments = [*arguments, f"run={run}"]
    for number in range(count):
        moment = MOMENTS[number % len(MOMENTS)]
        left, saved = _partials(run), newest(run)
        seen = set(left)
        with RankProcesses(killed, arguments, size=size) as ranks:
            if moment == "any":
                time.sleep(draw.uniform(0.0, 1.1 * start))
            elif moment == "save":
                for _ in range(draw.randint(1, 2)):
                    seen |= _partials(run)
                    until(lambda: _partials(run) - seen or not ranks.running(), "a save")  # noqa: B023
                time.sleep(draw.uniform(0.0, 0.02))
            else:
                # Its own steps: the log of an earlier life may be longer than what was saved, and
                # ranks that have not met yet wait for each other as long as a rendezvous may take.
                steps_done = draw.randint(1, 2)
                until(
                    lambda: ranks.steps_said() >= steps_done or not ranks.running(),  # noqa: B023
                    "a step",
                )
                time.sleep(draw.uniform(0.0, 0.1))
            life = _kill(ranks, run, left, draw, both=moment == "any" or size == 1)
        past = steps_of(run)
        life |= {"moment": moment, "step": past[-1] if past else 0, "saved": newest(run)}
        life["resumed"] = resumed_from(ranks)
        if life["resumed"] is not None and life["resumed"] != saved:
            raise RuntimeError(f"went on from {life['resumed']}, not from {saved}")
        lives.append(life)
    with RankProcesses(killed, arguments, size=size) as ranks:
        if any(ranks.wait(300)):
            raise RuntimeError(ranks.said())
        final = resumed_from(ranks)
    a, b = tensors(whole / "run", steps), tensors(run, steps)
    different = [n for n in a.keys() | b.keys() if n not in a or n not in b]
    different += [n for n in a.keys() & b.keys() if not torch.equal(a[n], b[n])]
    lost = [life["step"] - life["saved"] for life in lives]
    survivors = [life for life in lives if life["survivor"] is not None]
    return {
        "count": len(lives),
        "moments": dict(Counter(life["moment"] for life in lives)),
        "during_save": sum(life["during_save"] for life in lives),
        "one_rank": len(survivors),
        "survivor_codes": dict(Counter(str(life["survivor"]) for life in survivors)),
        "survivor_seconds": max((life["seconds"] for life in survivors), default=0.0),
        "steps": steps,
        "steps_lost_most": max(lost),
        "steps_lost": sum(lost),
        "last_resumed": final,
        "tensors": len(a),
        "different": different,
        "same_losses": losses_of(whole / "run") == losses_of(run),
        "seconds": time.monotonic() - began,
        "lives": lives,
    }


def _kill(
    ranks: RankProcesses, run: Path, left: set[tuple[str, int]], draw: random.Random, *, both: bool
) -> dict[str, Any]:
    """SIGKILL one rank or both; a survivor has to end by itself."""
    if not ranks.running():
        raise RuntimeError(f"ended before it was killed:\n{ranks.said()[-2000:]}")
    victims = ranks.processes if both or draw.random() < 0.4 else [draw.choice(ranks.processes)]
    for process in victims:
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    for process in victims:
        process.wait()
    # Nobody finishes a save without all ranks, so one that is not finished now never was.
    during_save = bool(_partials(run) - left)
    try:
        codes = ranks.wait(TIMEOUT + 15)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the other rank did not end:\n{ranks.said()[-2000:]}") from None
    other = [c for p, c in zip(ranks.processes, codes, strict=True) if p not in victims]
    return {
        "during_save": during_save,
        "survivor": other[0] if other else None,
        "seconds": time.monotonic() - began,
    }
