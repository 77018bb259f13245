"""Small real runs for faults: their processes, their disks, and what they leave."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.common import logged, until
from fastrepa.runtime.world import outside_the_world
from tests import warm as forks

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 6.0  # survival.timeout_seconds
LONG = "training.steps=100000"
# The quickstart's data and encoder, and a model whose checkpoint takes a moment to write.
RUN = [
    str(ROOT / "configs/quickstart.yaml"), f"data.path={ROOT / 'configs/quickstart/emoji/train'}",
    "model.width=192", "model.depth=4", "model.heads=6", "alignment.projector_width=256",
    "training.global_batch=8", "training.log_every=1", "training.sample_every=0",
    "training.tensorboard=false", "sample.num=4", "sample.steps=2", "training.keep_checkpoints=2",
    "training.checkpoint_every=2",
]  # fmt: skip
# A life of it takes less than a second: no encoder, a checkpoint of a few hundred kilobytes.
TINY = [
    *RUN[:2], "training.global_batch=12", "vision.encoders=[]",
    "model.width=32", "model.depth=2", "model.heads=2",
    "training.precision=fp32", "training.log_every=1", "training.tensorboard=false",
    "training.sample_every=0", "sample.num=1", "sample.steps=1", "training.checkpoint_every=2",
    "training.keep_checkpoints=1", "training.schedule.name=constant",
    f"survival.timeout_seconds={TIMEOUT}",
]  # fmt: skip


class RankProcesses:
    """A run's processes, without a launcher above them; what they print goes to FOLDER/out.txt.

    warm: forks, which take the signals that tests/warm.py hands on, and SIGKILL.
    """

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        *,
        size: int = 2,
        wrap: Sequence[str] = (),
        fault: str = "",
        warm: bool = False,
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
        python = forks.python() if warm else [*wrap, sys.executable]
        command = [*python, "-m", program, "train", *arguments]
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

    def ended(self, ranks: Iterable[int], seconds: float) -> list[tuple[int | None, float | None]]:
        """Wait for these; returns each one's exit code and when it ended (epoch), None if not."""
        found: dict[int, tuple[int, float]] = {}
        wanted, ends = list(ranks), time.monotonic() + seconds
        while len(found) < len(wanted) and time.monotonic() < ends:
            for rank in wanted:
                code = self.processes[rank].poll()
                if code is not None and rank not in found:
                    found[rank] = code, time.time()
            time.sleep(0.01)
        return [found.get(rank, (None, None)) for rank in wanted]

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


def resumed_in(said: str) -> int | None:
    """Find the step from which a run says that it goes on, None where it did not come to that."""
    found = re.findall(r"continuing .* from step (\d+)", said.replace("\n", " "))
    return int(found[-1]) if found else None


def resumed_from(ranks: RankProcesses) -> int | None:
    """Find the step from which these processes went on, as resumed_in does."""
    return resumed_in(ranks.said()[ranks.before :])


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
