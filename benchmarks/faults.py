"""Faults in small real runs, and what came of each, to benchmarks/records/.

    python -m benchmarks.faults [kills2] [kills3] [hosts] [ranks] [files] [saves] [--kills 25]

    kills2  a run of two processes, in ZeRO-2, is killed again and again (SIGKILL, to one rank or to
            both, while a checkpoint is being written, in mid-step, at any moment), started again
            each time, and compared bit by bit with an undisturbed one.
    kills3  the other half of the kills, in ZeRO-3.
    hosts   two hosts in network namespaces: one is killed, then the link is pulled (two_hosts.py).
    ranks   one of two is frozen (SIGSTOP), fails while the engine is built, is lost as the last
            save begins, is told to stop (SIGUSR1), reads NaN.
    files   a byte of the newest checkpoint is flipped; the disk is full while one is written.
    saves   what a save costs the steps beside it, of SiT-B/4.

`python -m benchmarks.report` prints the table. tests/end_to_end run the same functions, smaller.
"""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common import command_line, logged, newest, steps_of, until
from benchmarks.run import RECORDS, append, environment
from benchmarks.two_hosts import lose_hosts, refusal
from fastrepa.checkpoint.format import checkpoints, step_number
from fastrepa.runtime.world import outside_the_world

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 6.0  # survival.timeout_seconds
RANKS = (
    ("first rank frozen (SIGSTOP)", "stop 0 3"),
    ("other rank frozen (SIGSTOP)", "stop 1 3"),
    ("error in one rank's start", "raise 1 build"),
    ("rank killed as the last save begins", "kill 1 last"),
    ("SIGUSR1 to one rank (pre-emption)", "usr1 1 3"),
    ("NaN in a sample, twice in a row", "nan 1 3 4"),
)
MOMENTS = ("save", "step", "save", "any")
# The quickstart's data and encoder, and a model whose checkpoint takes a moment to write.
RUN = [
    str(ROOT / "configs/quickstart.yaml"), f"data.path={ROOT / 'configs/quickstart/emoji/train'}",
    "model.width=192", "model.depth=4", "model.heads=6", "alignment.projector_width=256",
    "training.global_batch=8", "training.log_every=1", "training.sample_every=0",
    "training.tensorboard=false", "sample.num=4", "sample.steps=2", "training.keep_checkpoints=2",
    "training.checkpoint_every=2",
]  # fmt: skip


class RankProcesses:
    """A run's processes, without a launcher above them; what they print goes to FOLDER/out.txt."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        *,
        size: int = 2,
        wrap: Sequence[str] = (),
        fault: str = "",
    ) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        meet = outside_the_world() | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(size), "FAULT": fault,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "out.txt"
        self.before = len(self.said())
        program = "tests.programs.faulty" if fault else "fastrepa"
        command = [*wrap, sys.executable, "-m", program, "train", *arguments]
        with self.output.open("ab") as output:
            self.processes = [
                subprocess.Popen(
                    command, env=meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT,
                    stdout=output, stderr=output,
                )
                for rank in range(size)
            ]  # fmt: skip

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self) -> str:
        """Read all that was printed so far, by earlier ones in this folder too."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def steps_said(self) -> int:
        """Count the steps that these processes have logged."""
        return self.said()[self.before :].count("\nstep ")

    def wait(self, seconds: float) -> list[int]:
        """Wait for the exit codes. Raises TimeoutExpired."""
        ends = time.monotonic() + seconds
        return [p.wait(max(0.01, ends - time.monotonic())) for p in self.processes]

    def running(self) -> bool:
        return all(p.poll() is None for p in self.processes)


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint (weights, EMA, optimiser states, generators), as kind/name."""
    folder = run / "checkpoints" / f"step_{step:07d}"
    return {
        f"{file.stem.split('-')[0]}/{name}": value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in logged(run)]


# Kills ----------------------------------------------------------------------------------------


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
                time.sleep(draw.uniform(0.0, 0.04))
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
        life["resumed"] = _resumed(ranks)
        if life["resumed"] is not None and life["resumed"] != saved:
            raise RuntimeError(f"went on from {life['resumed']}, not from {saved}")
        lives.append(life)
    with RankProcesses(killed, arguments, size=size) as ranks:
        if any(ranks.wait(300)):
            raise RuntimeError(ranks.said())
        final = _resumed(ranks)
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


def _resumed(ranks: RankProcesses) -> int | None:
    """The step from which these processes went on, None where they did not come to say so."""
    said = re.findall(r"continuing .* from step (\d+)", ranks.said()[ranks.before :])
    return int(said[-1]) if said else None


# Ranks ----------------------------------------------------------------------------------------


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
        resumed = _resumed(ranks)
    return {
        "fault": fault, "code": code, "seconds": seconds, "step": logged[0], "saved": saved,
        "errors": [
            line.replace(f"{ROOT}/", "").replace(f"{folder}/", "")
            for line in re.findall(r"^fastrepa: error.*$", said, re.M)
        ],
        "resumed": resumed or 0,
        "codes_again": codes,
    }  # fmt: skip


# Files ----------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of its own for a folder, in a mount namespace that needs no root."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        folder.mkdir(parents=True)
        mount = f"mount -t tmpfs -o size={megabytes}m tmpfs '{folder}' && exec sleep infinity"
        # As on NAMESPACES' list, but its processes stay ours to signal.
        self.holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
        )
        self.enter = ["nsenter", "--target", str(self.holder.pid), "--user", "--mount",
                      "--preserve-credentials", f"--wd={ROOT}"]  # fmt: skip
        self.path = Path(f"/proc/{self.holder.pid}/root{folder}")  # as seen from outside
        until(lambda: self.path.is_mount() or self.holder.poll() is not None, "a mount", 10)

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.kill()
        self.holder.wait()

    def fill(self) -> None:
        """Fill it to its last byte."""
        with (self.path / "ballast").open("wb", buffering=0) as f:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while f.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def clear(self) -> None:
        (self.path / "ballast").unlink()


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
            resumed, said_again = _resumed(ranks), ranks.said()
    warnings = r"^warning: .*(?:cannot be written|is damaged).*$"
    return {
        "code": code, "warned_seconds": warned, "kept": kept, "last": last, "logged": logged,
        "warnings": re.findall(warnings, said, re.M), "code_again": code_again, "before": before,
        "resumed": resumed, "warnings_again": re.findall(warnings, said_again, re.M),
    }  # fmt: skip


# The command ----------------------------------------------------------------------------------


def _shape(arguments: list[str]) -> str:
    found = dict(a.split("=", 1) for a in arguments if "=" in a)
    return f"SiT {found['model.width']} wide, {found['model.depth']} deep, batch of 8"


def measure(part: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """The records of one part; of `count` kills each stage's are about half."""
    fixed = {"case": "faults", "direction": "survived", "dtype": "fp32", "shape": _shape(RUN)}
    records: list[dict[str, Any]] = []
    if part in ("kills2", "kills3"):
        stage = int(part[-1])
        share = count - count // 2 if stage == 2 else count // 2
        arguments = [*RUN, f"zero.stage={stage}", "training.precision=fp32"]
        done = kills(folder / part, arguments, count=share, steps=30, seed=stage)
        records.append(fixed | {"provider": f"SIGKILL, ZeRO-{stage}", "stage": stage} | done)
    if part == "hosts":
        if reason := refusal():
            raise SystemExit(reason)
        (folder / "hosts").mkdir()
        *faults, end = lose_hosts(folder / "hosts", [*RUN, "training.precision=fp32"])
        for done in faults:
            records.append(fixed | {"provider": done["fault"], "count": 1} | done | {"end": end})
    if part == "ranks":
        common = [*RUN, "training.precision=fp32", "training.steps=6", "survival.bad_steps=2"]
        for number, (provider, fault) in enumerate(RANKS):
            done = planted(folder / f"ranks{number}", fault, common)
            records.append(fixed | {"provider": provider, "count": 1} | done)
    if part == "files":
        done = disk_full_and_flipped_byte(folder / "files", [*RUN, "training.precision=fp32"])
        for provider in ("disk full", "flipped byte"):
            records.append(fixed | {"provider": provider, "count": 1} | done)
    if part == "saves":
        overrides = [
            "model.width=768", "model.depth=12", "model.heads=12",
            "training.global_batch=2", "training.steps=31",
            "training.checkpoint_every=10", "training.log_every=1", "training.sample_every=0",
            "training.tensorboard=false", "sample.num=1", "sample.steps=1",
            "training.precision=fp32", "zero.stage=1", *RUN[1:2],
        ]  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.save_cost", str(folder / "saves"), RUN[0]]
        done = subprocess.run(
            [*command, *overrides], cwd=ROOT, capture_output=True, text=True, check=False,
            env=outside_the_world() | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        cost = json.loads(done.stdout.splitlines()[-1])
        named = {"provider": "save", "shape": "SiT-B/4, batch of 2"}
        records.append(fixed | named | {"count": len(cost["seconds"])} | cost)
    return records


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("faults", __doc__)
    parts = ("kills2", "kills3", "hosts", "ranks", "files", "saves")
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--record", type=Path, default=RECORDS / "faults_cpu.jsonl")
    options = parser.parse_args(arguments)
    context = environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts or parts:
            records = measure(part, options.kills, Path(folder))
            append(options.record, records, context)
            for record in records:
                print(json.dumps({k: v for k, v in record.items() if k != "lives"}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
