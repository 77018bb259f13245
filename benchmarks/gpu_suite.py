"""Everything worth knowing from one GPU in one call: tests first, then cases, most valuable first.

    python -m benchmarks.gpu_suite [--minutes 9] [--out FOLDER] [--skip-tests]

Needs torch, triton and pytest. Every case is saved as it ends; run again, the suite goes on where
it stopped (a case already recorded for this commit, device, shape and dtype is not repeated). A
case is not started when the time left is less than the slowest case so far took. If the tests
fail, nothing is measured. The training steps need pydantic and pyyaml and are skipped without them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, GPU_SHAPES, Case, Shape
from benchmarks.run import PROVIDERS, RECORDS, append, environment, measure, table
from benchmarks.training_step import measure_steps
from fastrepa_kernels.cost import measure_ceilings

ROOT = Path(__file__).resolve().parents[1]
TRAINING_STEPS = [("SiT-B/2", 128), ("SiT-XL/2", 64)]


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


def already_measured(path: Path, commit: str, device: str) -> set[tuple[str, str, str]]:
    if not path.exists():
        return set()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (r["case"], r["shape"], r["dtype"])
        for r in records
        if r["git"] == commit and r["device"] == device
    }


def engine_missing() -> str:
    """What the training steps need and is not here, '' where all is."""
    needed = ("pydantic", "yaml")
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
    start, slowest = time.monotonic(), 0.0
    if not options.skip_tests and not run_tests():
        print("gpu_suite: the tests failed on this device; nothing was measured")
        return 1
    device = torch.device("cuda")
    context = environment(device)
    ceilings = measure_ceilings(device)
    print(
        f"{context['device']}: copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, "
        f"bf16 products {ceilings.flops_per_second / 1e12:.0f} TFLOP/s"
    )
    path = options.out / "gpu_suite.jsonl"
    done = already_measured(path, context["git"], context["device"])
    everything: list[dict[str, Any]] = []
    left_out = 0
    for model, batch in () if engine_missing() else TRAINING_STEPS:
        if ("training_step", f"{model} b{batch} t256", "bf16") in done:
            continue
        began = time.monotonic()
        if began - start + slowest > 60 * options.minutes:
            left_out += 1
            continue
        records = measure_steps(model, batch, device, ["eager", "ours", "compile"], repeats=10)
        append(path, records, context)
        everything += records
        slowest = max(slowest, time.monotonic() - began)
        print(f"training_step {model} b{batch}: {time.monotonic() - began:.0f} s", flush=True)
        torch.cuda.empty_cache()
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
