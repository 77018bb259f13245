"""Faults in small real runs, and what came of each, to benchmarks/records/.

    python -m benchmarks.faults [PART ...] [--kills 12] [--places 60] [--jobs 2]

    kills2   a run of two processes, in ZeRO-2, is killed again and again (SIGKILL, to one rank or
             to both, while a checkpoint is being written, in mid-step, at any moment), started
             again each time, and compared bit by bit with an undisturbed one.
    kills3   the other half of the kills, in ZeRO-3.
    writes1  a run is killed at every call by which it changes its folder, from its start over
             steps and saves to its end, just before it, after it or half-way (placed.c).
    writes3  the same of three ranks: the writes of the first and of the last rank.
    hosts    two hosts in network namespaces: one is killed, then the link is pulled (two_hosts.py).
    ranks    one of two is frozen (SIGSTOP), fails while the engine is built, is lost as the last
             save begins, is told to stop (SIGUSR1), reads NaN.
    ranks34  each of three, and of four, is killed or frozen, in ZeRO-1, 2 and 3.
    suspended  three ranks are all stopped for longer than the timeout, and go on.
    signals  SIGTERM five times in 25 ms, SIGUSR1 three times, SIGTERM to torchrun and its ranks.
    owners   a second `train`, `sample` or `data encode` in a folder where one is at work.
    files    a byte of the newest checkpoint is flipped; the disk is full while one is written.
    disk     the disk is full as a run starts, and from some step on to its end.
    nan      weights become infinite while every step is saved and old ones are pruned.
    saves    what a save costs the steps beside it, of SiT-B/4.

`python -m benchmarks.report` prints the table. tests/end_to_end run the same functions, smaller.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command_line
from benchmarks.faults import files, owners, ranks
from benchmarks.faults.kills import kills
from benchmarks.faults.placed import placed
from benchmarks.faults.processes import ROOT, RUN, TIMEOUT, TINY
from benchmarks.run import RECORDS, append, environment
from benchmarks.two_hosts import lose_hosts, refusal
from fastrepa.runtime.world import outside_the_world
from tests import warm

Records = list[dict[str, Any]]
Part = Callable[[Namespace, Path], Records]
FP32 = [*RUN, "training.precision=fp32"]


def _shape(arguments: list[str]) -> str:
    found = dict(a.split("=", 1) for a in arguments if "=" in a)
    size = f"{found['model.width']} wide, {found['model.depth']} deep"
    return f"SiT {size}, batch of {found['training.global_batch']}"


def _kills(stage: int) -> Part:
    def part(options: Namespace, folder: Path) -> Records:
        count = options.kills
        share = count - count // 2 if stage == 2 else count // 2
        arguments = [*FP32, f"zero.stage={stage}"]
        done = kills(folder, arguments, count=share, steps=30, seed=stage)
        return [{"provider": f"SIGKILL, ZeRO-{stage}", "stage": stage} | done]

    return part


def _writes(size: int) -> Part:
    def part(options: Namespace, folder: Path) -> Records:
        most = options.places if size > 1 else 0
        done = placed(folder / "placed", ranks=size, most=most, jobs=options.jobs)
        name = f"SIGKILL at a write, {size} rank{'s' * (size > 1)}"
        return [{"provider": name, "shape": _shape(TINY)} | done]

    return part


def _hosts(options: Namespace, folder: Path) -> Records:
    if reason := refusal():
        raise SystemExit(reason)
    *faults, end = lose_hosts(folder, FP32)
    return [{"provider": done["fault"], "count": 1} | done | {"end": end} for done in faults]


def _ranks(options: Namespace, folder: Path) -> Records:
    common = [*FP32, "training.steps=6", "survival.bad_steps=2"]
    return [
        {"provider": provider, "count": 1} | ranks.planted(folder / str(number), fault, common)
        for number, (provider, fault) in enumerate(ranks.RANKS)
    ]


def _of_trials(provider: str, expected: str, trials: Records) -> dict[str, Any]:
    """One record of several trials: what was expected of each, how often it came true, and what
    was seen where it did not.
    """
    right = sum(trial["right"] for trial in trials)
    saw = list(dict.fromkeys(trial["saw"] for trial in trials if not trial["right"]))
    lost = [trial["step"] - trial["saved"] for trial in trials if "step" in trial]
    return {
        "provider": provider, "shape": _shape(TINY), "count": len(trials), "right": right,
        "expected": expected, "saw": saw, "steps_lost_most": max(lost, default=None),
        "lives": trials,
    }  # fmt: skip


def _ranks34(options: Namespace, folder: Path) -> Records:
    records = []
    within = TIMEOUT + ranks.LATE
    expected = f"all others end within {within:g} s with exit code 76, naming that rank alone"
    warm.python()  # its server starts before there are threads
    for size in (3, 4):
        for kind, done in (("kill", "killed"), ("stop", "frozen")):
            cases = [(stage, victim) for stage in (1, 2, 3) for victim in range(size)]
            lose = partial(_lose, folder, kind, size)
            with ThreadPoolExecutor(options.jobs) as pool:  # most of a trial is waiting
                trials = list(pool.map(lose, cases))
            provider = f"each of {size} ranks {done} in turn, ZeRO-1, 2 and 3"
            record = _of_trials(provider, expected, trials)
            ended = [s for trial in trials for s in trial["seconds"] if s is not None]
            records.append(record | {"seconds_most": max(ended, default=None)})
    return records


def _lose(folder: Path, kind: str, size: int, case: tuple[int, int]) -> dict[str, Any]:
    stage, victim = case
    place = folder / f"{kind}{size}_{stage}_{victim}"
    return ranks.lose(place, kind, victim, size=size, stage=stage)


def _suspended(options: Namespace, folder: Path) -> Records:
    provider = "three ranks stopped for longer than the timeout, then continued"
    trial = ranks.suspended(folder)
    return [_of_trials(provider, "they go on, and nobody is blamed", [trial])]


def _signals(options: Namespace, folder: Path) -> Records:
    expected = "the step under way is saved, and it ends as one to be started again"
    return [
        _of_trials(what, expected, [ranks.signalled(folder / str(number), what)])
        for number, what in enumerate(ranks.SIGNALLED)
    ]


def _owners(options: Namespace, folder: Path) -> Records:
    expected = "the second is refused by a line with folder and owner, the first ends undisturbed"
    records = []
    for what, two in owners.OWNERS.items():
        place = folder / what.replace(" ", "_")
        place.mkdir()
        records.append(_of_trials(f"a second `{what}` in its folder", expected, [two(place)]))
    return records


def _files(options: Namespace, folder: Path) -> Records:
    done = files.disk_full_and_flipped_byte(folder, FP32)
    return [{"provider": name, "count": 1} | done for name in ("disk full", "flipped byte")]


def _disk(options: Namespace, folder: Path) -> Records:
    expected = "one line and an exit code, what was there is whole, continued once there is room"
    records = []
    for when in ("start", "end"):
        trial = files.disk_full_at(folder / when, when)
        records.append(_of_trials(f"disk full at the {when} of a run", expected, [trial]))
    return records


def _nan(options: Namespace, folder: Path) -> Records:
    expected = "the last finite checkpoint is kept, and `sample` takes it"
    provider = "infinite weights, saved at every step, two kept"
    return [_of_trials(provider, expected, [owners.not_finite(folder)])]


def _saves(options: Namespace, folder: Path) -> Records:
    overrides = [
        "model.width=768", "model.depth=12", "model.heads=12",
        "training.global_batch=2", "training.steps=71",
        "training.checkpoint_every=10", "training.log_every=1", "training.sample_every=0",
        "training.tensorboard=false", "sample.num=1", "sample.steps=1",
        "training.precision=fp32", "zero.stage=1", RUN[1],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.save_cost", str(folder / "saves"), RUN[0], *overrides],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=outside_the_world() | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    cost = json.loads(done.stdout.splitlines()[-1])
    named = {"provider": "save", "shape": "SiT-B/4, batch of 2"}
    return [named | {"count": len(cost["seconds"])} | cost]


PARTS: dict[str, Part] = {
    "kills2": _kills(2), "kills3": _kills(3), "writes1": _writes(1), "writes3": _writes(3),
    "hosts": _hosts, "ranks": _ranks, "ranks34": _ranks34, "suspended": _suspended,
    "signals": _signals, "owners": _owners, "files": _files, "disk": _disk, "nan": _nan,
    "saves": _saves,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("faults", __doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--kills", type=int, default=12, help="of kills2 and kills3 together")
    parser.add_argument("--places", type=int, default=60, help="of writes3; 0: every one")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, where most is waiting")
    parser.add_argument("--record", type=Path, default=RECORDS / "faults_cpu.jsonl")
    options = parser.parse_args(arguments)
    context = environment(torch.device("cpu"))
    fixed = {"case": "faults", "direction": "survived", "dtype": "fp32", "shape": _shape(RUN)}
    chosen, began = options.parts or list(PARTS), time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, part in enumerate(chosen, 1):
                seconds = time.monotonic() - began
                print(f"{part} ({number} of {len(chosen)}, after {seconds:.0f} s)", file=sys.stderr)
                (Path(folder) / part).mkdir()
                records = [fixed | done for done in PARTS[part](options, Path(folder) / part)]
                append(options.record, records, context)
                for record in records:
                    print(json.dumps({k: v for k, v in record.items() if k != "lives"}), flush=True)
    finally:
        warm.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
