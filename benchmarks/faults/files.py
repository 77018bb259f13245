"""Disks that are full, and a byte that is flipped."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import newest, steps_of, until
from benchmarks.faults.processes import (
    TINY,
    RankProcesses,
    SmallDisk,
    resumed_from,
)
from fastrepa.checkpoint.format import checkpoints, step_number


def disk_full_and_flipped_byte(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Fill the disk while a run writes its second checkpoint, clear it again, stop the run; flip a
    byte of the newest checkpoint and start it again. What was said, and what was lost.
    """
    place = folder / "disk"
    arguments = [*arguments, "training.checkpoint_every=3", "training.keep_checkpoints=0"]
    with SmallDisk(place, 512) as disk:
        run = disk.path / "run"
        arguments += [f"run={place / 'run'}"]
        more = [*arguments, "training.steps=100000"]
        with RankProcesses(folder / "full", more, size=1, wrap=disk.enter) as ranks:
            until(lambda: newest(run) > 0 or not ranks.running(), "a checkpoint")
            disk.fill()
            full = time.monotonic()
            until(lambda: "still counts" in ranks.said() or not ranks.running(), "a warning")
            warned, kept = time.monotonic() - full, newest(run)
            # Lines of metrics find room in the file's last page for a while.
            until(lambda: "lines wait" in ranks.said() or not ranks.running(), "another warning")
            seen = ranks.said().count("\nstep ")
            until(lambda: ranks.said().count("\nstep ") > seen + 2 or not ranks.running(), "steps")
            disk.clear()
            until(lambda: newest(run) > kept + 3 or not ranks.running(), "two more checkpoints")
            ranks.processes[0].send_signal(signal.SIGTERM)
            (code,) = ranks.wait(60)
            said = ranks.said()
        last, logged = newest(run), steps_of(run)
        file = run / f"checkpoints/step_{last:07d}/ema.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        before = step_number(checkpoints(run)[-2]) or 0
        more = [*arguments, f"training.steps={before + 1}"]
        with RankProcesses(folder / "flipped", more, size=1, wrap=disk.enter) as ranks:
            (code_again,) = ranks.wait(120)
            resumed, said_again = resumed_from(ranks), ranks.said()
    warnings = r"^warning: .*(?:cannot be written|is damaged).*$"
    return {
        "exit_code": code, "warned_seconds": warned, "kept": kept, "last": last, "logged": logged,
        "warnings": re.findall(warnings, said, re.M), "code_again": code_again, "before": before,
        "resumed": resumed, "warnings_again": re.findall(warnings, said_again, re.M),
    }  # fmt: skip


def disk_full_at(folder: Path, when: str) -> dict[str, Any]:
    """Continue a run on a disk that is full at its `start`, or from its third step on to its `end`,
    and again once there is room. It came true if the first ends by one line and not with 0, what
    was there is whole, and the second goes on from it to the end.
    """
    place = folder / "disk"
    with SmallDisk(place, 64) as disk:
        run = disk.path / "run"
        arguments = [*TINY, f"run={place / 'run'}"]
        with RankProcesses(
            folder / "begun", [*arguments, "training.steps=4"], size=1, wrap=disk.enter
        ) as ranks:
            if any(ranks.wait(120)):
                raise RuntimeError(ranks.said())
        before = _content(run)
        slow = ["training.global_batch=240", "training.micro_batch=4"] if when == "end" else []
        last = [*arguments, *slow, "training.steps=9", "training.checkpoint_every=0"]
        if when == "start":
            disk.fill()
        with RankProcesses(folder / "full", last, size=1, wrap=disk.enter) as ranks:
            if when == "end":
                until(lambda: steps_of(run)[-1:] == [6] or not ranks.running(), "a step")
                disk.fill()
            ((code, _),) = ranks.ended([0], 120)
            said = ranks.said()
        reached = max(steps_of(run), default=0)
        kept, whole = newest(run), before.items() <= _content(run).items()
        disk.clear()
        with RankProcesses(folder / "again", last, size=1, wrap=disk.enter) as ranks:
            ((code_again, _),) = ranks.ended([0], 120)
            resumed = resumed_from(ranks)
        steps = steps_of(run)
    errors = re.findall(r"^fastrepa: error.*$", said, re.M)
    told = len(errors) == 1 and "Traceback" not in said and "Logging error" not in said
    right = code not in (None, 0) and told and whole and (kept, resumed, code_again) == (4, 4, 0)
    saw = f"ended with {code}" + (f": {errors[0][17:160]}" if len(errors) == 1 else "")
    saw += "" if told else f"; {len(errors)} error lines, {said.count('Traceback')} tracebacks"
    saw += f"; checkpoint {kept} {'whole' if whole else 'or config.yaml DAMAGED'}"
    saw += f"; then continued from {resumed}, exit code {code_again}"
    return {
        "when": when, "exit_code": code, "errors": errors, "whole": whole,
        "step": reached, "saved": kept,
        "resumed": resumed, "code_again": code_again, "steps_once": steps == list(range(1, 10)),
        "right": right and steps == list(range(1, 10)), "saw": saw.replace(f"{place}/", ""),
    }  # fmt: skip


def _content(run: Path) -> dict[str, bytes]:
    """The bytes of a run's checkpoints, and the names in its config.yaml."""
    config = yaml.safe_load((run / "config.yaml").read_bytes()) or {}
    return {"config.yaml": " ".join(config).encode()} | {
        str(path.relative_to(run)): path.read_bytes()
        for path in (run / "checkpoints").glob("step_*/*")
    }
