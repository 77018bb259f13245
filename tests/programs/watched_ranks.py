"""Ranks that only meet and are watched, in worlds of three and four: what each says when some fail.

Prints a line of JSON for every trial of TRIALS: the ranks' exit codes, stderr and seconds from the
fault to their end, in which `None` stands for a rank that went on.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from fastrepa.errors import DataError, FastrepaError, print_error
from fastrepa.runtime.survival import watched
from fastrepa.runtime.world import init_world

TIMEOUT = 4.0
FOR = 1.0  # seconds before the fault
LAST = 30  # the step after which ranks leave where one is killed at the end
AT_ONCE = 5  # trials
# world size, what happens to which ranks: killed, stopped, an error of the user's or of the code's
TRIALS = {
    "kill 0 of 3": (3, {0: "kill"}),
    "kill 1 of 3": (3, {1: "kill"}),
    "kill 2 of 4": (4, {2: "kill"}),
    "kill 1 and 3 of 4": (4, {1: "kill", 3: "kill"}),
    "stop 0 of 3": (3, {0: "stop"}),
    "stop 3 of 4": (4, {3: "stop"}),
    "error 0 of 4": (4, {0: "error"}),
    "error 2 of 3": (3, {2: "error"}),
    "refused 0 of 3": (3, {0: "refused"}),
    "refused 1 and 2 of 3": (3, {1: "refused", 2: "refused"}),
    "kill 1 of 3 at the end": (3, {1: "end"}),
    "interrupt 2 of 3": (3, {2: "interrupt"}),
    "suspend all of 1": (1, {0: "suspend"}),
    "suspend all of 4": (4, dict.fromkeys(range(4), "suspend")),
}


def listeners() -> list[str]:
    """Where this process listens: address:port, as the kernel writes it."""
    mine = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            mine.add(os.readlink(fd))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
                found.append(words[1])
    return found


def rank_of(rank: int, size: int, port: int, fault: str, folder: Path) -> None:
    """One rank: steps that all take together, and its fault after a while."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    world = init_world()
    limits = SimpleNamespace(timeout_seconds=TIMEOUT, stall_seconds=60.0)
    with watched(folder, limits, world) as watch:
        dist.barrier(group=watch.group)
        (folder / f"listens{rank}").write_text(" ".join(listeners()))
        (folder / f"ready{rank}").touch()
        began, step, enough = time.monotonic(), 0, torch.zeros(())
        while not enough:  # all take the same steps
            enough.fill_((folder / "enough").exists())
            dist.all_reduce(enough, op=dist.ReduceOp.MAX, group=watch.group)
            step += 1
            watch.progress(step)
            time.sleep(0.02)
            if time.monotonic() - began > FOR and not (folder / "failed").exists():
                if fault == "error":
                    raise ValueError("planted")
                if fault == "refused":
                    raise DataError("planted")
                if fault == "interrupt":
                    raise KeyboardInterrupt
            if step == LAST and fault in ("end", "leave"):  # to the barrier in which the watch ends
                if fault == "end":
                    time.sleep(0.5)
                    os.kill(os.getpid(), signal.SIGKILL)
                return


def forked(*args) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        folder, rank = args[-1], args[0]
        said = os.open(folder / f"err{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 2)
        os.dup2(said, 1)
        rank_of(*args)
        code = 0
    except FastrepaError as e:
        print_error(e, args[0])
    except BaseException as e:
        sys.stderr.write(f"Traceback: {e!r}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def start(size: int, faults: dict[int, str], folder: Path) -> list[int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder.mkdir()
    other = "leave" if "end" in faults.values() else ""
    return [forked(r, size, port, faults.get(r, other), folder) for r in range(size)]


def strike(pids: list[int], faults: dict[int, str]) -> None:
    numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "suspend": signal.SIGSTOP}
    for rank, fault in faults.items():
        if fault in numbers:
            os.kill(pids[rank], numbers[fault])


class Trial:
    """A world of ranks with a fault in some; suspended ones are all continued, last one first."""

    def __init__(self, name: str, folder: Path) -> None:
        size, self.faults = TRIALS[name]
        self.name, self.folder, self.size = name, folder, size
        self.pids = start(size, self.faults, folder)
        self.ends: list[tuple[int, float] | None] = [None] * size

    def ready(self) -> bool:
        return all((self.folder / f"ready{r}").exists() for r in range(self.size))

    def ended(self) -> bool:
        """Tell whether all ranks have, but for those that are stopped for good."""
        return all(end or self.faults.get(r) == "stop" for r, end in enumerate(self.ends))

    def look(self, began: float) -> None:
        for rank, pid in enumerate(self.pids):
            if self.ends[rank] is None and (status := os.waitpid(pid, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(status[1])
                self.ends[rank] = (code, time.monotonic() - began)

    def close(self) -> None:
        for rank, pid in enumerate(self.pids):
            if self.ends[rank] is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def run(names: list[str], root: Path) -> None:
    """Some trials side by side: their ranks mostly wait."""
    trials = [Trial(name, root / str(number)) for number, name in enumerate(names)]
    while not all(trial.ready() for trial in trials):
        time.sleep(0.02)
    time.sleep(FOR)
    for trial in trials:
        strike(trial.pids, trial.faults)
    began = time.monotonic()
    suspended = [trial for trial in trials if "suspend" in trial.faults.values()]

    def look_for(seconds: float) -> None:
        while time.monotonic() - began < seconds and not all(trial.ended() for trial in trials):
            for trial in trials:
                trial.look(began)
            time.sleep(0.02)

    look_for(TIMEOUT + 1)
    for trial in suspended:
        for pid in reversed(trial.pids):
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.2)
    look_for(2 * TIMEOUT + 1)
    for trial in suspended:
        (trial.folder / "enough").touch()
    look_for(3 * TIMEOUT)
    for trial in trials:
        trial.close()
        said = [(trial.folder / f"err{r}").read_text() for r in range(trial.size)]
        listen = [(trial.folder / f"listens{r}").read_text().split() for r in range(trial.size)]
        found = {"trial": trial.name, "ends": trial.ends, "said": said, "listen": listen}
        print(json.dumps(found), flush=True)


def main() -> None:
    names = list(TRIALS)
    for first in range(0, len(names), AT_ONCE):
        with tempfile.TemporaryDirectory() as root:
            run(names[first : first + AT_ONCE], Path(root))


if __name__ == "__main__":
    main()
