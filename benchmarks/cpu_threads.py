"""Measures what CPU threads make of the quickstart's rate, on a machine that others use or not.

    python -m benchmarks.cpu_threads [--seconds 6] [--busy 4] [--quota 1] [--record FILE]

Three machines: idle; with so many other processes that never rest; with a CPU quota of so many
cores, by a cgroup of our own (left out, with a line that says so, where none can be made). On each:

    spinning   a thread a core, which wait as libgomp has it by default (300,000 rounds)
    one        one thread
    passive    a thread a core, which sleep while they wait
    chosen     as fastrepa chooses by itself (runtime/threads.py)

Each is `fastrepa train` in a process of its own; rates are of `--seconds` after the twelfth step,
or after as many seconds where steps are slow, so that no trial is in them; a run ends 25 seconds
after its first step. Takes six minutes, in which nothing else should run here.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command_line, logged, until
from benchmarks.run import RECORDS, append, environment
from fastrepa.config import load_config
from fastrepa.errors import FastrepaError
from fastrepa.runtime.hardware import usable_cores
from fastrepa.runtime.threads import COUNT, POLICY, SPIN, others
from fastrepa.runtime.world import outside_the_world

ROOT = RECORDS.parents[1]
CONFIG = ROOT / "configs/quickstart.yaml"
PYTHON = [sys.executable]
SETTING = (
    "training.steps=100000", "training.log_every=1", "training.sample_every=0",
    "training.checkpoint_every=0", "training.tensorboard=false", "sample.num=1", "sample.steps=1",
)  # fmt: skip
GROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))  # of version 1, of version 2
TRIAL = 12  # steps before the clock runs
START, LIMIT = 180.0, 25.0  # seconds until the first step, and after it, at most


def contenders(cores: int) -> dict[str, dict[str, str]]:
    """Return what each has in its environment."""
    all_of_them = {COUNT: str(cores)}
    return {
        "spinning": all_of_them | {SPIN: "300000"},
        "one": {COUNT: "1"},
        "passive": all_of_them | {POLICY: "PASSIVE"},
        "chosen": {},
    }


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes computing."""
    with ExitStack() as stack:
        for _ in range(processes):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


@contextmanager
def quota(cores: float) -> Iterator[Path | None]:
    """Make a cgroup that may use so many cores; None where none can be made."""
    group = next(filter(None, (_group(top, round(cores * 100_000)) for top in GROUPS)), None)
    yield group
    if group:
        group.rmdir()


def _group(top: Path, limit: int) -> Path | None:
    """Make a cgroup that may compute for so many microseconds in 0.1 seconds."""
    group = top / f"fastrepa-{os.getpid()}"
    with suppress(OSError):
        group.mkdir()
    with suppress(OSError):
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text(str(limit))
        else:
            (group / "cpu.max").write_text(f"{limit} 100000")
        return group
    with suppress(OSError):
        group.rmdir()
    return None


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def rate(run: Path, setting: dict[str, str], seconds: float, group: Path | None) -> dict[str, Any]:
    """Train for a while; return images_per_s, the steps it is of, and how threads were chosen."""
    env = {k: v for k, v in outside_the_world().items() if k not in (COUNT, SPIN, POLICY)}
    words = [*PYTHON, "-m", "fastrepa", "train", str(CONFIG), f"run={run}", *SETTING]
    output = run.with_suffix(".txt")
    with output.open("w") as out:
        process = subprocess.Popen(
            words, env=env | setting, cwd=ROOT, stdout=out, stderr=out,
            preexec_fn=partial(_enter, group) if group else None,
        )  # fmt: skip
        try:
            first, last = _window(run, seconds, process)
        finally:
            process.send_signal(signal.SIGKILL)  # nobody wants its checkpoint
            process.wait()
    lines = [line for line in logged(run) if first <= line["seconds"] <= last]
    steps = max(0, len(lines) - 1)
    took = lines[-1]["seconds"] - lines[0]["seconds"] if steps else LIMIT
    return {
        "images_per_s": steps * load_config(CONFIG).training.global_batch / took,
        "from_step": lines[0]["step"] if lines else 0,
        "steps": steps,
        "said": output.read_text().partition("cpu (")[2].partition(") x ")[0],
        "switches": [line["threads"] for line in logged(run) if "threads" in line],
    }


def _window(run: Path, seconds: float, process: subprocess.Popen[Any]) -> tuple[float, float]:
    """Wait; return the run's ages between which its lines count: two steps at the least, or all
    that there is where steps are too slow for that.
    """
    until(lambda: logged(run) or process.poll() is not None, f"{run.name}: a step", START, 0.2)
    ends = time.monotonic() + LIMIT
    while time.monotonic() < ends and process.poll() is None:
        time.sleep(0.5)
        lines = logged(run)
        slow = [x for x in lines if x["seconds"] > lines[0]["seconds"] + seconds]
        since = [x["seconds"] for x in (slow if len(lines) < TRIAL else lines[TRIAL - 1 :])]
        if len(since) > 2 and since[-1] - since[0] >= seconds:
            return since[0], since[-1]
    if process.poll() is not None:
        raise FastrepaError(f"{run.name}: ended by itself: {run.with_suffix('.txt').read_text()}")
    return 0.0, math.inf


def measure(options: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """One record for each machine and contender."""
    cores = usable_cores()
    for machine in ("idle", "busy", "quota"):
        free = others()
        with ExitStack() as stack:
            group = None
            if machine == "busy":
                stack.enter_context(busy(options.busy))
            if machine == "quota":
                group = stack.enter_context(quota(options.quota))
                if group is None:
                    print("quota: left out, this process may make no cgroup with one")
                    return
            for provider, setting in contenders(cores).items():
                found = rate(folder / f"{machine}_{provider}", setting, options.seconds, group)
                print(f"{machine:6} {provider:9} {found['images_per_s']:6.1f} images/s")
                yield {
                    "case": "cpu_threads", "shape": "quickstart", "dtype": "fp32",
                    "provider": provider, "direction": machine, "cores": cores,
                    "others_before": free, "busy_processes": options.busy,
                    "quota_cores": options.quota, "setting": setting, **found,
                }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("cpu_threads", __doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each rate")
    parser.add_argument("--busy", type=int, default=4, help="other processes of the busy machine")
    parser.add_argument("--quota", type=float, default=1.0, help="cores")
    parser.add_argument("--record", type=Path, default=None, help="JSONL to append to; - for none")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fastrepa-threads-") as folder:
        records = list(measure(options, Path(folder)))
    context = environment(torch.device("cpu"))
    if str(options.record) != "-":
        append(options.record or RECORDS / "cpu_threads_cpu.jsonl", records, context)
    from benchmarks.report import threads

    print(threads([record | context for record in records]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
