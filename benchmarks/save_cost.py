"""Measures what a checkpoint costs the steps beside it: one process, its loop timed from outside.

    python -m benchmarks.save_cost FOLDER CONFIG [key=value ...]

An iteration is a step and what the loop does after it, saving included. A save costs what the
iterations that overlap it (from the first copy until the folder has its name) take longer than the
median of those that overlap none. Prints one JSON object.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastrepa.checkpoint.format import checkpoints
from fastrepa.config import load_config
from fastrepa.runtime.survival import watched
from fastrepa.runtime.world import destroy_world, init_world
from fastrepa.training.run import Run


def save_cost(folder: Path, config: Path, overrides: list[str]) -> dict[str, Any]:
    """Every save's own seconds by part, and what it cost; the last one, which is waited for, left
    out.
    """
    resolved = load_config(config, [*overrides, f"run={folder / 'run'}"])
    world = init_world()
    began: list[float] = []
    saves: list[tuple[float, dict[str, float]]] = []
    with watched(Path(resolved.run), resolved.survival, world) as watch:
        run = Run(resolved, world, watch.group)
        trainer = run.trainer
        step, save = trainer.train_step, run.save

        def timed_step(batches: Any) -> Any:
            began.append(time.perf_counter())
            return step(batches)

        def timed_save(**options: Any) -> Path:
            at = time.perf_counter()
            path = save(**options)
            assert run.writer is not None
            saves.append((at, run.writer.seconds))
            return path

        trainer.train_step, run.save = timed_step, timed_save  # type: ignore[method-assign]
        run.train(watch)
        parameters = sum(p.numel() for p in trainer.whole.params.values())
    destroy_world()
    iterations = list(itertools.pairwise(began[1:]))  # the first one is no normal one
    costs, seconds, calm = [], [], []
    windows = [(at, at + parts["save"], parts) for at, parts in saves[:-1]]
    for start, end in iterations:
        if not any(start < until and end > at for at, until, _ in windows):
            calm.append(end - start)
    normal = statistics.median(calm)
    for at, until, parts in windows:
        slow = [b - a for a, b in iterations if a < until and b > at]
        costs.append(sum(slow) - normal * len(slow))
        seconds.append(parts)
    file_bytes = sum(p.stat().st_size for p in (folder / "run/checkpoints").glob("*/*.safetensors"))
    return {
        "parameters": parameters,
        "bytes": file_bytes // len(checkpoints(folder / "run")),
        "threads": torch.get_num_threads(),
        "step_seconds": normal,
        "step_seconds_spread": [min(calm), max(calm)],
        "calm_steps": len(calm),
        "seconds": seconds,
        "cost_seconds": costs,
        "share": statistics.median(c / p["save"] for c, p in zip(costs, seconds, strict=True)),
        "share_copied": statistics.median(p["copy"] / p["save"] for p in seconds),
    }


if __name__ == "__main__":
    done = save_cost(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    print(json.dumps(done))
