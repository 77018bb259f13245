"""Everything worth knowing from one GPU in one call: tests first, then cases, most valuable first.

    python -m benchmarks.gpu_suite [--minutes 9] [--out FOLDER] [--skip-tests]

1. the kernel tests on the device (T3); if they fail, nothing is measured
2. whole training steps of SiT-XL/2 and SiT-B/2 by `fastrepa bench`: ours, with CUDA graphs, eager,
   eager under torch.compile, the published step; and with DINOv2 beside the generator
3. every operation against its rivals, the main shape of each before the others

Needs torch, triton and pytest, and for the steps what `pip install fastrepa[engine]` brings; they
are skipped without. Every case is saved as it ends; run again, the suite goes on where it stopped
(what passed or is recorded for this commit and device is not repeated). A case is not started when
the time left is less than the slowest of its kind took.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, GPU_SHAPES, Case, Shape
from benchmarks.run import PROVIDERS, RECORDS, append, environment, measure, table
from fastrepa_kernels.cost import measure_ceilings

ROOT = Path(__file__).resolve().parents[1]
STEP_SECONDS = 200.0  # assumed of a training step's contenders, before one was measured


@dataclass(frozen=True)
class TrainingStep:
    """A configuration whose step is measured, and `fastrepa bench`'s contenders beside ours."""

    name: str
    config: str
    overrides: tuple[str, ...]
    batch: int
    against: tuple[str, ...]
    precision: str = "bf16"


STORED = ("data.latents=cached", "vision.targets=cached")
ONLINE = ("data.latents=cached", "vision.targets=online", "vision.encoders.0.weights=random")
B2, XL2 = (f"configs/imagenet256_sit_{size}2_dinov2b.yaml" for size in ("b", "xl"))
ALL = ("ours+graphs", "eager", "eager+compile", "reference")
TRAINING_STEPS = (
    TrainingStep("SiT-XL/2, stored targets", XL2, STORED, 64, ALL),
    TrainingStep("SiT-B/2, stored targets", B2, STORED, 256, ALL),
    TrainingStep("SiT-XL/2, targets online", XL2, ONLINE, 64, ("ours+graphs", "reference")),
)


def run_tests() -> bool:
    """T3: the kernel tests on the device."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", "tests/kernels"],
        cwd=ROOT,
        check=False,
    )
    return done.returncode == 0


def plan() -> Iterator[tuple[Case, Shape, str]]:
    """The main shape of every case, then every other shape of every case; bf16."""
    for shape in GPU_SHAPES:
        for case in CASES.values():
            yield case, shape, "bf16"


def measure_step(step: TrainingStep, *, rounds: int = 2, steps: int = 5) -> list[dict[str, Any]]:
    """The records of all contenders of one configuration, in turns."""
    from fastrepa.config import load_config
    from fastrepa.insight.bench import FILE, bench

    config = load_config(ROOT / step.config, step.overrides)
    with tempfile.TemporaryDirectory() as folder:
        bench(
            config, against=step.against, precisions=[step.precision], batches=[step.batch],
            rounds=rounds, steps=steps, warmup=3, out=Path(folder),
        )  # fmt: skip
        lines = (Path(folder) / FILE).read_text().splitlines()
    return [json.loads(line) | {"name": step.name} for line in lines]


def recorded(path: Path, commit: str, device: str) -> list[dict[str, Any]]:
    """The file's records of this commit and device."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if r["git"] == commit and r["device"] == device]


def already_measured(path: Path, commit: str, device: str) -> set[tuple[str, str, str]]:
    return {(r["case"], r["shape"], r["dtype"]) for r in recorded(path, commit, device)}


def steps_measured(path: Path, commit: str, device: str) -> set[str]:
    """Names of the training steps that are recorded."""
    return {r["name"] for r in recorded(path, commit, device)}


def engine_missing() -> str:
    """What the training steps need and is not here, '' where all is."""
    needed = ("pydantic", "yaml", "safetensors", "deepspeed", "timm")
    return ", ".join(m for m in needed if importlib.util.find_spec(m) is None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_suite: no CUDA device")
        return 2
    start, slowest = time.monotonic(), 0.0  # of an operation's case
    device = torch.device("cuda")
    context = environment(device)
    commit, name = context["git"], context["device"]
    path, steps_path = options.out / "gpu_suite.jsonl", options.out / "training_step_cuda.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    passed = options.out / "gpu_suite_tests.json"
    tested = {"git": commit, "device": name}
    if not options.skip_tests and not (
        passed.exists() and json.loads(passed.read_text()) == tested
    ):
        if not run_tests():
            print("gpu_suite: the tests failed on this device; nothing was measured")
            return 1
        passed.write_text(json.dumps(tested))
    done, measured = already_measured(path, commit, name), steps_measured(steps_path, commit, name)
    everything: list[dict[str, Any]] = []
    left_out, slowest_step = 0, STEP_SECONDS
    for step in () if engine_missing() else TRAINING_STEPS:
        began = time.monotonic()
        if step.name in measured:
            continue
        if began - start + slowest_step > 60 * options.minutes:
            left_out += 1
            continue
        append(steps_path, measure_step(step), context)
        slowest_step = max(slowest_step, time.monotonic() - began)
        print(f"{step.name}: {time.monotonic() - began:.0f} s", flush=True)
    ceilings = measure_ceilings(device)
    print(
        f"{name}: copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, "
        f"bf16 products {ceilings.flops_per_second / 1e12:.0f} TFLOP/s"
    )
    for case, shape, dtype in plan():
        if (case.name, str(shape), dtype) in done:
            continue
        began = time.monotonic()
        if began - start + slowest > 60 * options.minutes:
            left_out += 1
            continue
        torch._dynamo.reset()  # or the recompile limit turns the rival into eager
        records = measure(case, shape, dtype, device, ceilings, list(PROVIDERS), repeats=20)
        ceiling = {
            "ceiling_bytes_per_s": ceilings.bytes_per_second,
            "ceiling_flops_per_s": ceilings.flops_per_second,
        }
        append(path, records, context | ceiling)
        everything += records
        slowest = max(slowest, time.monotonic() - began)
        print(f"{case.name} {shape}: {time.monotonic() - began:.0f} s", flush=True)
        torch.cuda.empty_cache()
    if engine_missing():
        print(f"training steps skipped: {engine_missing()} not installed")
    text = table(everything)
    (options.out / "gpu_suite.txt").write_text(text + "\n")
    print(text)
    print(f"{left_out} cases left out for time; run again to go on" if left_out else "complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
