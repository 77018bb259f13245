"""Two commands of one kind in one folder; training with infinite weights: what is left."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import steps_of, until
from benchmarks.faults.processes import LONG, ROOT, TINY
from fastrepa.runtime.files import HOST
from fastrepa.runtime.world import outside_the_world
from tests import warm

PATIENCE = 20.0  # seconds in which a second one is to be refused


class Command:
    """`fastrepa WORDS` in a process of its own; what it prints goes to a file."""

    def __init__(self, output: Path, *words: object) -> None:
        self.output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [*warm.python(), "-m", "fastrepa", *map(str, words)], cwd=ROOT,
                env=outside_the_world() | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file,
            )  # fmt: skip

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def code(self, seconds: float) -> int | None:
        """Wait for its exit code; None where it goes on for longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def living(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def refused(self, code: int | None, folder: Path) -> bool:
        """Tell whether it ended by one line that names the folder, and the host of its owner."""
        lines = re.findall(r"^fastrepa: error.*$", self.said(), re.M)
        named = len(lines) == 1 and folder.name in lines[0] and HOST in lines[0]
        return code not in (None, 0) and named

    def ended_by(self, code: int | None) -> str:
        """Say what it ended with, or that it works too."""
        if code is None:
            return "works as well"
        lines = [line for line in self.said().splitlines() if line.strip()]
        words = lines[-1].strip()[:200] if code and lines else ""
        return f"ended with {code}" + (f": {words}" if words else "")


def two_trains(folder: Path) -> dict[str, Any]:
    """Train beside a living training run of the same folder."""
    run = folder / "run"
    words = ["train", *TINY, LONG, "training.checkpoint_every=50", f"run={run}"]
    with Command(folder / "first.txt", *words) as first:
        until(lambda: len(steps_of(run)) > 5 or not first.living(), "steps")
        with Command(folder / "second.txt", *words) as second:
            code = second.code(PATIENCE)
            refused, saw = second.refused(code, run), second.ended_by(code)
        at = max(steps_of(run), default=0)
        until(lambda: max(steps_of(run), default=0) > at + 5 or not first.living(), "steps", 20)
        first.process.send_signal(signal.SIGTERM)
        own = first.code(60)
    steps = steps_of(run)
    once = steps == list(range(1, len(steps) + 1))
    right = refused and own == 75 and once
    saw = f"the second {saw}; the first ended with {own}" + ("" if once else ", steps logged twice")
    return {"what": "train", "codes": [own, code], "right": right, "saw": saw}


def two_samples(folder: Path) -> dict[str, Any]:
    """Draw images of another seed into the folder that a first one is filling."""
    run, out, count = folder / "run", folder / "images", 200
    with Command(folder / "train.txt", "train", *TINY, "training.steps=2", f"run={run}") as trained:
        if trained.code(60):
            raise RuntimeError(trained.said())
    words = ["sample", run, "--num", count, "--batch-size", 2, "--steps", 20, "--out", out]
    with Command(folder / "first.txt", *words, "--seed", 1) as first:
        until(lambda: any(out.glob("0*.png")) or not first.living(), "an image")
        with Command(folder / "second.txt", *words, "--seed", 2) as second:
            code = second.code(PATIENCE)
            refused, saw = second.refused(code, out), second.ended_by(code)
        own = first.code(60)
    images = len(list(out.glob("0*.png")))
    seed = json.loads((out / "sampling.json").read_text())["seed"]
    right = refused and own == 0 and (images, seed) == (count, 1)
    saw = f"the second {saw}; the first ended with {own}; {images} images, seed {seed} noted"
    return {"what": "sample", "codes": [own, code], "right": right, "saw": saw}


def two_encodes(folder: Path) -> dict[str, Any]:
    """Store features of an encoder in a set while a first one stores them."""
    data = folder / "set"
    shutil.copytree(ROOT / "configs/quickstart/emoji/train", data)
    words = ["data", "encode", data, "--cache-features", "test_vit=random@32", "--batch-size", 1]
    with Command(folder / "first.txt", *words) as first:
        before = {path.name for path in (ROOT / "configs/quickstart/emoji/train").iterdir()}
        until(
            lambda: {p.name for p in data.iterdir()} - before or not first.living(), "a first file"
        )
        with Command(folder / "second.txt", *words) as second:
            code = second.code(PATIENCE)
            refused, saw = second.refused(code, data), second.ended_by(code)
        own = first.code(120)
    with Command(folder / "verify.txt", "data", "verify", data) as verified:
        sound = verified.code(60)
    right = refused and own == 0 and sound == 0
    saw = f"the second {saw}; the first ended with {own}; verify ends with {sound}"
    return {"what": "data encode", "codes": [own, code], "right": right, "saw": saw}


OWNERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "train": two_trains,
    "sample": two_samples,
    "data encode": two_encodes,
}


def not_finite(folder: Path) -> dict[str, Any]:
    """Train at a rate that makes the weights infinite, saved at every step and pruned to two. It
    came true if the last finite checkpoint is kept, and `sample` takes a finite one or none.
    """
    run, out = folder / "run", folder / "images"
    words = ["train", *TINY, f"run={run}", "training.schedule.warmup=0", "survival.bad_steps=3"]
    codes = []
    for more in (
        ["training.steps=4", "training.keep_checkpoints=3"],
        ["training.steps=40", "training.optimizer.lr=1e39", "training.checkpoint_every=1",
         "training.keep_checkpoints=2"],
    ):  # fmt: skip
        with Command(folder / "train.txt", *words, *more) as trained:
            codes.append(trained.code(90))
    kept = {int(path.name[5:]): _finite(path) for path in (run / "checkpoints").glob("step_*")}
    with Command(folder / "sample.txt", "sample", run, "--num", 2, "--out", out) as drawn:
        code = drawn.code(60)
    record = out / "sampling.json"
    step = json.loads(record.read_text())["checkpoint_step"] if record.exists() else None
    right = codes == [0, 1] and kept.get(4, False)
    right &= kept.get(step, False) if code == 0 else code == 1 and not all(kept.values())
    names = ", ".join(f"{n}{'' if finite else ' (not finite)'}" for n, finite in kept.items())
    taken = f"sample takes {step}" if code == 0 else f"sample ends with {code}"
    return {
        "codes": codes, "kept": sorted(kept), "finite": sorted(n for n in kept if kept[n]),
        "sampled": step, "sample_code": code, "right": right,
        "saw": f"kept {names or 'none'}; {taken}",
    }  # fmt: skip


def _finite(checkpoint: Path) -> bool:
    from safetensors.torch import load_file

    files = checkpoint.glob("*.safetensors")
    return all(bool(v.isfinite().all()) for f in files for v in load_file(f).values())
