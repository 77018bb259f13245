"""Runs as forks of a process that has imported everything, each killed at one of its writes.

`python -m benchmarks.faults.lives ASK.json RESULT.json` is started by placed.py, under the library
that counts writes (placed.c) where that could be compiled.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import newest, steps_of
from benchmarks.faults.processes import losses_of, resumed_in, tensors
from fastrepa.runtime.world import outside_the_world
from tests import warm

FIRST, LAST = 2, 5  # the step that lives go on from, and their last one
BEFORE, HALF, AFTER = 1, 2, 3  # as placed.c has them
PATIENCE = 120.0  # seconds: what has not ended then hangs
# Python's own events, where there is no library: what they are about is below the folder.
EVENTS = {
    "os.mkdir": "mkdir", "os.remove": "unlink", "os.rename": "rename", "os.rmdir": "rmdir",
    "os.link": "link", "os.truncate": "truncate",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A write of a rank: the number-th since the process began; the others may die with it."""

    rank: int
    number: int
    moment: int
    together: bool


class Lives:
    """Lives of one small run on `ranks` ranks; each in a folder of its own, from step FIRST on."""

    def __init__(self, folder: Path, arguments: list[str], ranks: int, library: str) -> None:
        self.folder, self.arguments, self.ranks = folder, arguments, ranks
        self.library = library

    def begin(self) -> None:
        """Train to FIRST, where all lives begin. Raises RuntimeError."""
        codes = self.wait(self.start(self.folder / "begun", FIRST))
        if any(codes):
            raise RuntimeError((self.folder / "begun/out.txt").read_text())

    def count(self) -> list[list[str]]:
        """Live undisturbed to LAST; returns each rank's writes. Raises RuntimeError."""
        life = self.copy("whole")
        if any(self.wait(self.start(life, LAST, dict.fromkeys(range(self.ranks), (0, 0))))):
            raise RuntimeError((life / "out.txt").read_text())
        self.whole = tensors(life / "run", LAST)
        self.losses = losses_of(life / "run")
        self.names = _hidden(life / "run")
        return [_written(life, rank) for rank in range(self.ranks)]

    def die(self, place: Place) -> dict[str, Any]:
        """Die at this place and live again to LAST; what came of it, beside the undisturbed one."""
        began = time.monotonic()
        life = self.copy(f"life{place.rank}_{place.number}")
        run, moment = life / "run", (place.number, place.moment)
        pids = self.start(life, LAST, {place.rank: moment})
        codes = self.wait(pids, end_with=place.rank if place.together else None)
        past, saved, written = steps_of(run), newest(run), _written(life, place.rank)
        reached = codes[place.rank] == -signal.SIGKILL and len(written) >= place.number
        # What was said so far is the log of an earlier life.
        (life / "out.txt").rename(life / "killed.txt")
        codes_again = self.wait(self.start(life, LAST))
        said = (life / "out.txt").read_text(errors="replace")
        resumed = resumed_in(said)
        same = self._compare(run) if not any(codes_again) else {}
        right = reached and bool(same) and not same["different"]
        right = right and same["steps_once"] and same["same_losses"]
        if right:
            shutil.rmtree(life)
        return {
            "rank": place.rank, "place": place.number, "moment": place.moment,
            "together": place.together, "call": written[-1] if written else "",
            "reached": reached, "codes": codes, "step": past[-1] if past else 0, "saved": saved,
            "resumed": resumed, "codes_again": codes_again, **same, "right": right,
            "said": "" if right else said[-2000:], "seconds": time.monotonic() - began,
        }  # fmt: skip

    def _compare(self, run: Path) -> dict[str, Any]:
        """Compare a life that ended with the undisturbed one: bits, lines of metrics, names."""
        a, b = self.whole, tensors(run, LAST)
        different = [n for n in a.keys() | b.keys() if n not in a or n not in b]
        different += [n for n in a.keys() & b.keys() if not torch.equal(a[n], b[n])]
        return {
            "different": different, "steps_once": steps_of(run) == list(range(1, LAST + 1)),
            "same_losses": losses_of(run) == self.losses,
            "left": sorted(_hidden(run) - self.names),
        }  # fmt: skip

    # Processes ------------------------------------------------------------------------------

    def copy(self, name: str) -> Path:
        """A new life's folder, with the run at step FIRST."""
        life = self.folder / name
        shutil.rmtree(life, ignore_errors=True)
        life.mkdir()
        shutil.copytree(self.folder / "begun/run", life / "run")
        return life

    def start(
        self, life: Path, steps: int, arms: dict[int, tuple[int, int]] | None = None
    ) -> list[int]:
        """Start the ranks; `arms`: at which write, and when in it, which of them ends."""
        life.mkdir(exist_ok=True)
        environment = outside_the_world() | {"OMP_NUM_THREADS": "1"}
        environment.pop("LD_PRELOAD", None)
        if self.ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = str(s.getsockname()[1])
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"WORLD_SIZE": str(self.ranks)}
        words = ["train", *self.arguments, f"training.steps={steps}", f"run={life / 'run'}"]
        pids = []
        for rank in range(self.ranks):
            sys.stdout.flush()
            if pid := os.fork():
                pids.append(pid)
                continue
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.ranks > 1 else {}
            os.environ.clear()
            os.environ.update(environment | own)
            output = os.open(life / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            random.seed()
            torch.seed()
            if arms and rank in arms:
                self._arm(life, rank, *arms[rank])
            warm.run("-m", "fastrepa", *words)
        return pids

    def _arm(self, life: Path, rank: int, number: int, moment: int) -> None:
        log = life / f"writes{rank}.txt"
        if self.library:
            library = ctypes.CDLL(self.library)
            library.placed_arm(
                str(life / "run").encode(), ctypes.c_long(number), moment, str(log).encode()
            )
        else:
            sys.addaudithook(counting(str(life / "run"), number, log))

    def wait(self, pids: Sequence[int], end_with: int | None = None) -> list[int | None]:
        """Wait for the exit codes; all end with that one rank where one is named. None: hung."""
        codes: dict[int, int] = {}
        ends = time.monotonic() + PATIENCE
        while len(codes) < len(pids) and time.monotonic() < ends:
            for rank, pid in enumerate(pids):
                if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(found[1])
            if end_with in codes:
                break
            time.sleep(0.003)
        for rank in {*range(len(pids))} - codes.keys():
            os.kill(pids[rank], signal.SIGKILL)
            os.waitpid(pids[rank], 0)
        return [codes.get(rank) for rank in range(len(pids))]


def counting(folder: str, last: int, log: Path) -> Callable[[str, tuple], None]:
    """Count as placed.c does, as far as Python tells: each open, rename and removal, no write."""
    numbers = itertools.count(1)

    def hook(event: str, details: tuple) -> None:
        name = EVENTS.get(event, "")
        if event == "open" and details[2] is not None and details[2] & (os.O_CREAT | os.O_TRUNC):
            name = "open"
        path = details[1 if name == "rename" else 0] if name else ""
        if not isinstance(path, str | bytes) or not os.fsdecode(path).startswith(folder + "/"):
            return
        number = next(numbers)
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w") as file:
            file.write(f"{name} {os.fsdecode(path)[len(folder) :]}\n")
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _written(life: Path, rank: int) -> list[str]:
    path = life / f"writes{rank}.txt"
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _hidden(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob(".*")}


def _share(lives: Lives, places: Sequence[Place], result: Path, number: int) -> int:
    """Fork a process that dies at these places, one after another; returns its number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        with result.with_suffix(f".{number}").open("w") as file:
            for place in places:
                file.write(json.dumps(lives.die(place)) + "\n")
                file.flush()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(code)


def choose(ask: dict[str, Any], written: list[list[str]]) -> list[Place]:
    """Which of the writes of the ranks that are asked about, and when in each of them."""
    draw, chosen = random.Random(ask["seed"]), []
    for rank in ask["victims"]:
        places = []
        for number, line in enumerate(written[rank], 1):
            torn = line.split()[0] in ("write", "pwrite", "writev", "sendfile", "copy")
            moment = draw.choice((BEFORE, HALF, AFTER) if torn else (BEFORE, AFTER))
            places.append(Place(rank, number, moment, draw.random() < ask["together"]))
        if ask["each_call_once"]:
            draw.shuffle(places)
            places = list({written[rank][p.number - 1].split()[0]: p for p in places}.values())
        most = min(ask["most"] // len(ask["victims"]) or len(places), len(places))
        apart, first = len(places) / most, draw.random()
        chosen += [places[int(apart * (i + first))] for i in range(most)]
    return chosen


def main(ask_path: str, result_path: str) -> None:
    ask, result = json.loads(Path(ask_path).read_text()), Path(result_path)
    warm.import_everything()
    folder = result.parent
    lives = Lives(folder, ask["arguments"], ask["ranks"], ask["library"])
    lives.begin()
    written = lives.count()
    places = choose(ask, written)
    jobs = min(ask["jobs"], len(places))
    pids = [_share(lives, places[job::jobs], result, job) for job in range(jobs)]
    failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
    if failed:
        raise SystemExit("a campaign's process failed")
    shares = [result.with_suffix(f".{job}").read_text().splitlines() for job in range(jobs)]
    found = {
        "writes": [written[rank] for rank in ask["victims"]],
        "tensors": len(lives.whole),
        "lives": [json.loads(line) for lines in shares for line in lines],
    }
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
